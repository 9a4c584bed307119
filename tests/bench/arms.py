"""The arms of the studies (tests/bench/study.py): each is a list of commands, run in turn.

{run}: the folder of this arm and seed. {baseline}, {pi}: those of these arms, of the same seed.
A study keeps every core busy with runs, so pretraining loads its batches by itself.
"""

# ------------------------------------------------------------------------------- the toy world

JUDGE = "perceptual_init.py --out_dir={run}/stage_1 configs/"
PRETRAIN = "pretrain.py configs/toy.py --workers=0 --out_dir={run} --init_vision="
PRETRAIN_JUDGED = PRETRAIN + "{run}/stage_1/ckpt.pt"
POSTHOC = ("perceptual_init.py configs/toy_posthoc.py --benchmarks= --out_dir={run} "
           "--init={baseline}/ckpt.pt")
TOY = {
    "baseline": [PRETRAIN],
    "pi": [JUDGE + "toy_nights.py", PRETRAIN_JUDGED],
    "shuffled": [JUDGE + "toy_nights_shuffled.py", PRETRAIN_JUDGED],  # permuted votes
    "posthoc": [POSTHOC],  # judgements after pretraining, at the rate of the toy's stage 1
    "posthoc_slow": [POSTHOC + " --lr=2e-5"],  # at a fiftieth of it, as for NIGHTS
    # rival explanations
    "permuted_weights": [PRETRAIN + "{pi}/stage_1/ckpt.pt configs/ideas/permuted_init.py"],
    "same_pictures": [JUDGE + "toy_nights.py configs/ideas/same_pictures.py", PRETRAIN_JUDGED],
    "longer": [PRETRAIN + " configs/ideas/longer_baseline.py --stage_1={pi}/stage_1/ckpt.pt"],
    "mimetic": [PRETRAIN + " configs/ideas/mimetic_init.py"],
    # dose: shares of the judgements, then shares of the 300 steps
    "pi_10pct": [JUDGE + "toy_nights_10pct.py", PRETRAIN_JUDGED],
    "pi_50pct": [JUDGE + "toy_nights_50pct.py", PRETRAIN_JUDGED],
    "pi_tenth": [JUDGE + "toy_nights.py --max_steps=30", PRETRAIN_JUDGED],
    "pi_third": [JUDGE + "toy_nights.py --max_steps=100", PRETRAIN_JUDGED],
    "pi_triple": [JUDGE + "toy_nights.py --max_steps=900", PRETRAIN_JUDGED],
}
EVALUATE_TOY = ("evaluate.py {run} --benchmarks=data/toy/benchmarks --nights=data/toy/nights "
                "--workers=0 --out={run}/eval")

# ------------------------------------------------------------ real pictures, docs/study/real.md

MIXED = JUDGE + "judgements.py"
FLICKR = "pretrain.py configs/flickr8k.py --out_dir={run} --init_vision="
FLICKR_JUDGED = FLICKR + "{run}/stage_1/ckpt.pt"
REAL = {
    "baseline": [FLICKR],
    "pi": [MIXED, FLICKR_JUDGED],
    "permuted_votes": [MIXED + " --shuffle_votes=True", FLICKR_JUDGED],
    # rival explanations, and judgements afterwards
    "permuted_weights": [FLICKR + "{pi}/stage_1/ckpt.pt configs/ideas/permuted_init.py"],
    "same_pictures": [MIXED + " configs/ideas/same_pictures.py", FLICKR_JUDGED],
    "longer": [FLICKR + " configs/ideas/longer_baseline.py --stage_1={pi}/stage_1/ckpt.pt"],
    "afterwards": ["perceptual_init.py configs/flickr8k_posthoc.py --out_dir={run} "
                   "--init={baseline}/ckpt.pt"],
    "mimetic": [FLICKR + " configs/ideas/mimetic_init.py"],
    # the search: dose of stage 1, its best checkpoint, kinds of judgement
    "pi_tenth": [MIXED + " --max_steps=30 --warmup_steps=3", FLICKR_JUDGED],
    "pi_third": [MIXED + " --max_steps=100 --warmup_steps=10", FLICKR_JUDGED],
    "pi_triple": [MIXED + " --max_steps=900 --warmup_steps=90", FLICKR_JUDGED],
    "pi_best": [FLICKR + "{pi}/stage_1/best.pt"],
    "food": [JUDGE + "food.py", FLICKR_JUDGED],
    "materials": [JUDGE + "materials.py", FLICKR_JUDGED],
    # a tower alone, one step at a millionth of the rate: what random weights know
    "random": [MIXED + " --max_steps=1 --lr=1e-9"],
}
EVALUATE_REAL = ("evaluate.py {run} --benchmarks=data/real/benchmarks "
                 "--judgements=data/real/judgements --workers=0 --out={run}/eval")
