"""ViTamin: convolutions bring the picture to the tokens, transformer blocks follow.

    python pretrain.py configs/toy.py configs/ideas/vitamin.py --benchmarks=data/toy/benchmarks

In the place of the patch embedding: a stem of two 3 x 3 convolutions (width C = D / 6, half
the side), a stage of MBConv blocks at a quarter of the side (C), one at an eighth (2C),
then patches of what is left, to the blocks' width D = 6C (arXiv 2404.02132; shapes from the
paper's page). The convolutions are part of the model: evaluate.py, which builds plain
towers, refuses its checkpoints. Zero-shot figures are those that the run writes at its end.
A tower of init_vision gives all but the patch embedding. Left out: GeGLU blocks, their
depths and widths of each size.
"""
from torch import nn

out_dir = "out/vitamin"
mbconv: tuple = (2, 4)   # blocks of the two stages


class _MBConv(nn.Module):
    """(B, in, s, s) -> (B, out, s / stride, s / stride): widen by 4, mix 3 x 3, narrow."""

    def __init__(self, d_in, d_out, stride):
        super().__init__()
        self.norm = nn.LayerNorm(d_in)
        self.mix = nn.Sequential(
            nn.Conv2d(d_in, 4 * d_in, 1), nn.GELU(),
            nn.Conv2d(4 * d_in, 4 * d_in, 3, stride, 1, groups=4 * d_in), nn.GELU(),
            nn.Conv2d(4 * d_in, d_out, 1))
        self.skip = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(d_in, d_out, 1))

    def forward(self, x):
        return self.skip(x) + self.mix(self.norm(x.movedim(1, 3)).movedim(3, 1))


class _Stem(nn.Module):
    """All patches of pictures (B, N - 1, 3PP), row by row -> tokens (B, N - 1, D)."""

    def __init__(self, size, depths):
        super().__init__()
        self.side, self.patch = size.image_size // size.patch_size, size.patch_size
        c = size.vision_width // 6
        layers = [nn.Conv2d(3, c, 3, 2, 1), nn.GELU(), nn.Conv2d(c, c, 3, 1, 1)]
        for d_in, d_out, depth in ((c, c, depths[0]), (c, 2 * c, depths[1])):
            layers.append(_MBConv(d_in, d_out, 2))
            layers += [_MBConv(d_out, d_out, 1) for _ in range(depth - 1)]
        last = size.patch_size // 8
        self.layers = nn.Sequential(*layers, nn.Conv2d(2 * c, size.vision_width, last, last))

    def picture(self, patches):
        """(B, N - 1, 3PP) -> (B, 3, S, S), each patch back in its place."""
        x = patches.unflatten(2, (3, self.patch, self.patch)).unflatten(1, (self.side, -1))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(self, patches):
        return self.layers(self.picture(patches)).flatten(2).mT


def prepare_model(clip, config):
    if clip.config.patch_size % 8:
        raise ValueError(f"vitamin: {config.model}'s patches are not a multiple of 8 pixels")
    clip.vision.patch_embed = _Stem(clip.config, config.mbconv)
