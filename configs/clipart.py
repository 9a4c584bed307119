"""The smallest run on real pictures: 7,373 clip arts and photographs, minutes on 2 CPU cores.

    apt-get download tuxpaint-stamps-default openclipart-png       # Debian, Ubuntu; 292 MB
    for package in *.deb; do dpkg -x $package clipart; done
    python -m data.prepare.own clipart/usr/share/tuxpaint/stamps data/clipart --captions=beside \\
        --name=tuxpaint --held_out=0.05 --short_side=64
    python -m data.prepare.own clipart/usr/share/openclipart/png data/clipart --captions=names \\
        --name=openclipart --held_out=0.05 --short_side=64
    python pretrain.py configs/clipart.py

Without CLIP's vocabulary, --vocabulary=data/toy/vocabulary/toy.tiktoken spells unknown words out.
"""
data = "data/clipart"
held_out = "data/clipart/held_out"  # 296 pairs: a guess finds the right one in 0.34 %
vocabulary = "data/clip.tiktoken"
out_dir = "out/clipart"

model = "toy"
image_size = 48
context_length = 32  # ids; the longest caption of a hundred has 31
crop = (0.5, 1.0)
flip = 0.5           # a few letters and flags suffer, most things do not

batch_size = 256
epochs = 20
warmup_steps = 50
lr = 2e-3
dtype = "float32"
compile = False
workers = 0
log_every = 28       # an epoch
eval_every = 140
save_every = 140
