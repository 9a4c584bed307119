"""The study on real pictures: what its recipes have in common, in one place (docs/study/real.md).

Chosen once on the baseline alone, before any arm that has seen judgements was looked at. The
data, data/real, is what docs/data.md says of Flickr8k and of five sets of judgements.
"""
model = "toy"
image_size = 32
dtype = "float32"
compile = False

STAGE_1_STEPS = 300   # of 128 triplets: an epoch of the mix of food and materials
PAIR_STEPS = 660      # of 128 pairs: 12 epochs of 7,099
