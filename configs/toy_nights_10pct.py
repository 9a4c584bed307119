"""The toy's stage 1 on 10 % of its training triplets, for as many steps."""
from configs.toy_nights import *

out_dir = "out/toy_nights_10pct"
fraction = 0.1
