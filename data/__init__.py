"""Everything about data: how it lies on disk, how it is read, and where it comes from.

    shards.py      pairs on disk: tar shards through an index, random access
    images.py      bytes -> pixels on the host; augmentation and normalisation on the device
    text.py        captions -> token ids
    order.py       which sample comes when, and the generator of its draws
    pairs.py       image-caption batches whose content depends on (seed, epoch, step) alone
    triplets.py    human judgements: is the left or the right image nearer to the reference?
    benchmarks.py  zero-shot and retrieval sets, and the table of rows to fill
    judgements.py  sets of judgements as rows of an evaluation
    results.py     result files, and what can be said of two or more runs
    plots.py       pictures of what results.py compares
    log.py         log.jsonl, the terminal's line, progress, a run's record
    ranks.py       which process of a run this is, and what the processes tell each other
    pieces.py      a training step in pieces: micro-batches, and chunks of the loss
    look.py        pairs to search in with a sentence or a picture, and the picture of them
    weights.py     CLIP weights in the files of OpenAI, open_clip and Hugging Face
    prepare/       commands that make, fetch or convert data, `python -m data.prepare.NAME`:
                   toy (a small world in all of these formats), own (your images and captions),
                   yfcc15m, nights, triplets, benchmarks, vocabulary (the published sets), check,
                   export (weights for others); and what they share: tars.py writes shards,
                   index.py reads and indexes them, captions.py reads tables, hub.py fetches

Commands write shards, `shards` indexes them once, `pairs` makes batches of them with `images`
and `text`. Only prepare/export.py imports the model.
"""
