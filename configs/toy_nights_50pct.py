"""The toy's stage 1 on 50 % of its training triplets (toy_nights_10pct's among them)."""
from configs.toy_nights import *

out_dir = "out/toy_nights_50pct"
fraction = 0.5
