"""Control: the toy's stage 1 with the votes permuted among the training triplets."""
from configs.toy_nights import *

out_dir = "out/toy_nights_shuffled"
shuffle_votes = True
