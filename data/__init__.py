"""Everything about data: how it lies on disk, how it is read, and where it comes from.

    shards.py      pairs on disk: tar shards, their index, random access
    images.py      bytes -> pixels on the host; augmentation and normalisation on the device
    text.py        captions -> token ids
    pairs.py       image-caption batches whose content depends on (seed, epoch, step) alone
    triplets.py    human judgements: is the left or the right image nearer to the reference?
    benchmarks.py  zero-shot and retrieval sets, and the table of rows to fill
    results.py     result files, paired statistics, power laws
    neighbours.py  pairs to search in with a sentence or a picture, and the picture of what is found
    foreign.py     CLIP weights in the files of OpenAI, open_clip and Hugging Face
    ranks.py       which process of a run this is, and what the processes tell each other
    toy.py         draws a small world in all of these formats, in seconds
    pack.py        your own images and captions -> shards
    prepare_yfcc15m.py  prepare_nights.py  prepare_benchmarks.py  prepare_vocabulary.py
                   the published sets -> the formats above
    download.py  progress.py
                   what these share: whole and checked downloads, a line with the time left

`prepare_yfcc15m` or `pack` write shards, `shards` indexes them once, `pairs` makes batches of them
with `images` and `text`. Nothing here imports the model.
"""
