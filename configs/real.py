"""The study on real pictures: what its recipes have in common, in one place (docs/study/real.md).

Chosen once on the baseline alone, before any arm that has seen judgements was looked at. The
data, data/real, is what docs/data.md says of Flickr8k and of five sets of judgements.
"""
model = "toy"
image_size = 48
dtype = "float32"
compile = False

STAGE_1_STEPS = 600   # of 128 triplets
PAIR_STEPS = 1100     # of 128 pairs: 20 epochs of 7,099
