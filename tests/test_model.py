"""The towers equal CLIP written out by hand and transformers' CLIP; their parts do as they say."""
import copy
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from model import CLIP, SIZES, CLIPConfig, VisionTower

SMALL = CLIPConfig(embed_dim=24, image_size=32, patch_size=8, vision_width=40, vision_layers=3,
                   vision_heads=2, context_length=20, vocab_size=50, text_width=36, text_layers=3,
                   text_heads=3)  # heads 20 and 12 wide, towers of different widths


def make_clip(config=SMALL, seed=0):
    torch.manual_seed(seed)
    clip = CLIP(config)
    with torch.no_grad():  # biases and gains as after training, not 0 and 1
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


def make_batch(config=SMALL, batch=13, seed=0):
    """Images (B, 3, S, S) and captions (B, L) of lengths 2 to L."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, config.image_size, config.image_size, generator=draw)
    tokens = torch.randint(1, config.vocab_size - 2, (batch, config.context_length), generator=draw)
    lengths = torch.randint(2, config.context_length + 1, (batch,), generator=draw)
    lengths[:2] = torch.tensor([config.context_length, 2])[:batch]
    for row, length in zip(tokens, lengths):
        row[0], row[length - 1], row[length:] = config.vocab_size - 2, config.vocab_size - 1, 0
    return images, tokens


def contrastive_loss(image_emb, text_emb, scale):
    logits = scale * image_emb @ text_emb.T  # (B, B)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# -------------------------------------------------------------------------- CLIP, written out plain

def plain_blocks(blocks, x, heads, causal):
    """x (B, N, D): every token through every block, attention as the softmax of a product."""
    for block in blocks:
        h = F.layer_norm(x, x.shape[2:], block.ln_1.weight, block.ln_1.bias)
        q, k, v = (h @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=2)
        q, k, v = (t.unflatten(2, (heads, -1)).movedim(2, 1) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[3])  # (B, H, N, N)
        if causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        y = (scores.softmax(3) @ v).movedim(1, 2).flatten(2)  # (B, N, D)
        x = x + y @ block.out.weight.T + block.out.bias
        h = F.layer_norm(x, x.shape[2:], block.ln_2.weight, block.ln_2.bias)
        h = h @ block.fc.weight.T + block.fc.bias
        h = h * torch.sigmoid(1.702 * h) if block.quick_gelu else F.gelu(h)
        x = x + h @ block.proj.weight.T + block.proj.bias
    return x


def plain_image(tower, images, keep=None, every=False):
    side = tower.config.patch_size
    x = F.conv2d(images, tower.patch_embed.weight.unflatten(1, (3, side, side)), stride=side)
    x = x.flatten(2).mT  # (B, N-1, D)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], 1) + tower.position_embedding
    if keep is not None:
        x = torch.stack([row[[0, *(1 + kept).tolist()]] for row, kept in zip(x, keep)])
    x = plain_blocks(tower.blocks, tower.ln_pre(x), tower.config.vision_heads, causal=False)
    return tower.ln_post(x if every else x[:, 0]) @ tower.projection.weight.T


def plain_text(tower, tokens, every=False):
    x = tower.token_embedding.weight[tokens] + tower.position_embedding[:tokens.shape[1]]
    x = plain_blocks(tower.blocks, x, tower.heads, causal=True)
    if not every:
        x = x[torch.arange(len(x)), tokens.argmax(1)]
    return tower.ln_final(x) @ tower.projection.weight.T


def plain_clip(clip, images, tokens):
    return (F.normalize(plain_image(clip.vision, images), dim=1),
            F.normalize(plain_text(clip.text, tokens), dim=1), clip.logit_scale.exp())


def gradients(clip, outputs):
    clip.zero_grad()
    contrastive_loss(*outputs).backward()
    return {name: parameter.grad.clone() for name, parameter in clip.named_parameters()}


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 13, 64])
def test_towers_equal_the_plain_form(quick_gelu, batch):
    """Packed captions = padded ones; class and end token alone = all tokens; fused
    attention = softmax; patches by reshape = convolution: values and gradients, in fp64, where
    only rounding (1e-16 an operation) parts them."""
    clip = make_clip(replace(SMALL, quick_gelu=quick_gelu)).double()
    images, tokens = make_batch(batch=batch)
    images = images.double()
    for ours, plain in ((clip.vision(images), plain_image(clip.vision, images)),
                        (clip.text(tokens), plain_text(clip.text, tokens))):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    if batch > 1:  # a batch of one has no gradient
        image_emb, text_emb = (F.normalize(e, dim=1) for e in (clip.vision(images),
                                                               clip.text(tokens)))
        ours = gradients(clip, (image_emb, text_emb, clip.logit_scale.exp()))
        plain = gradients(clip, plain_clip(clip, images, tokens))
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-9, atol=1e-11)


def test_in_fp32_the_plain_form_differs_by_1e_6():
    clip = make_clip()
    batch = make_batch()
    for ours, plain in zip(clip(*batch), plain_clip(clip, *batch)):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    ours, plain = gradients(clip, clip(*batch)), gradients(clip, plain_clip(clip, *batch))
    for name in plain:  # relative to the largest entry: a sum over the batch and tokens
        assert (ours[name] - plain[name]).abs().max() <= 1e-5 * plain[name].abs().max() + 1e-7


def test_recomputed_blocks_give_the_same_bits():
    clip, batch = make_clip(), make_batch()
    kept = gradients(clip, clip(*batch))
    clip.vision.recompute = clip.text.recompute = True
    again = gradients(clip, clip(*batch))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_what_follows_the_end_token_changes_nothing():
    clip = make_clip()
    tokens = make_batch()[1]
    other = tokens.clone()
    for row, end in zip(other, tokens.argmax(1)):
        row[end + 1:] = 7
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(other))


def test_a_repeated_end_token_is_padding():
    """transformers pads with the end token: the first one counts."""
    clip = make_clip()
    tokens = make_batch()[1]
    other = tokens.clone()
    for row, end in zip(other, tokens.argmax(1)):
        row[end:] = row[end]
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(other))


def test_a_token_changes_later_positions_only():
    tower = make_clip().text
    tokens = make_batch(batch=1)[1]  # (1, 20), all real
    other = tokens.clone()
    other[0, 12] = 1 + (tokens[0, 12] + 1) % 40
    x, y = tower(tokens, every=True)[0], tower(other, every=True)[0]  # (20, E)
    assert torch.equal(x[:12], y[:12]) and (x[12:] != y[12:]).any(dim=1).all()


def test_captions_may_be_cut_to_their_longest():
    clip = make_clip()
    tokens = make_batch()[1]
    tokens = tokens[tokens.argmax(1) < 9]
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(tokens[:, :9]))


def test_captions_do_not_depend_on_their_order():
    clip = make_clip()
    tokens = make_batch(batch=40)[1]
    order = torch.randperm(40)
    torch.testing.assert_close(clip.encode_text(tokens)[order], clip.encode_text(tokens[order]),
                               rtol=0, atol=1e-6)  # products of other tilings


@pytest.mark.parametrize("causal", [False, True])
def test_attention_written_out_for_bf16_is_the_fused_kernels(causal):
    """In bf16 on a CPU it stands as matrix products; result and gradient are those of fp32."""
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 9, 3 * 32, generator=draw).bfloat16().requires_grad_()  # (B, N, 3D)
    exact = qkv.detach().float().requires_grad_()
    grad = torch.randn(3, 9, 32, generator=draw)                                 # (B, N, D)
    ours, fused = (model.attend(*x.chunk(3, 2), heads=4, causal=causal) for x in (qkv, exact))
    assert ours.shape == fused.shape == (3, 9, 32) and ours.dtype == torch.bfloat16
    ours.backward(grad.bfloat16())
    fused.backward(grad)
    for found, wanted in ((ours, fused), (qkv.grad, exact.grad)):  # bf16 keeps 8 bits
        torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


# ------------------------------------------------------------- packed captions, patches, all tokens

def test_linear_layers_see_the_real_tokens_of_captions_and_no_other():
    tower, tokens = make_clip().text, make_batch()[1]
    lengths, seen = tokens.argmax(1) + 1, []
    for layer in (tower.blocks[0].fc, tower.blocks[1].qkv, tower.blocks[2].fc):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape))
    assert tower(tokens).shape == (13, SMALL.embed_dim)
    total, width = int(lengths.sum()), SMALL.text_width
    assert seen == [(total, width), (total, width), (13, 1, width)]


def test_the_plan_says_where_each_token_lies():
    tower = make_clip().text
    tokens = torch.tensor([[48, 7, 49, 0, 0], [48, 49, 49, 49, 49], [48, 5, 6, 49, 3]])
    ids, cells, ends, real = tower.plan(tokens)
    assert ids.tolist() == [48, 7, 49, 48, 49, 48, 5, 6, 49]
    assert cells.tolist() == [0, 1, 2, 4, 5, 8, 9, 10, 11]  # of rows of 4
    assert ends.tolist() == [2, 4, 8]
    assert real.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_every_text_token_is_that_of_the_plain_form_and_zero_behind_the_end():
    tower, tokens = make_clip().text.double(), make_batch()[1]
    tokens = tokens[tokens.argmax(1) < 15]
    ends = tokens.argmax(1)
    longest = int(ends.max()) + 1
    ours = tower(tokens, every=True)
    assert ours.shape == (len(tokens), longest, SMALL.embed_dim)
    behind = torch.arange(longest) > ends[:, None]
    assert behind.any() and not ours[behind].any()
    plain = plain_text(tower, tokens[:, :longest], every=True)
    torch.testing.assert_close(ours[~behind], plain[~behind], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[range(len(ends)), ends], tower(tokens), rtol=1e-10, atol=1e-10)


def test_every_vision_token_is_that_of_the_plain_form():
    tower, images = make_clip().vision.double(), make_batch()[0].double()
    ours = tower(images, every=True)
    assert ours.shape == (13, 17, SMALL.embed_dim)
    torch.testing.assert_close(ours, plain_image(tower, images, every=True), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[:, 0], tower(images), rtol=1e-10, atol=1e-10)


def test_kept_patches_alone_are_seen_each_at_its_place():
    """Against the plain form on the kept tokens; other pixels change nothing; order neither."""
    tower, images = make_clip().vision.double(), make_batch()[0].double()
    keep = torch.rand(13, 16, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :5]
    ours = tower(images, keep=keep)
    assert ours.shape == (13, SMALL.embed_dim)
    assert tower(images, keep=keep, every=True).shape == (13, 6, SMALL.embed_dim)
    torch.testing.assert_close(ours, plain_image(tower, images, keep), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, tower(images, keep=keep.flip(1)), rtol=1e-10, atol=1e-10)
    everything = torch.arange(16).expand(13, -1)
    torch.testing.assert_close(tower(images, keep=everything), tower(images), rtol=1e-10, atol=1e-10)
    patch = int(min(set(range(16)) - set(keep[0].tolist())))
    row, column = divmod(patch, 4)
    images[0, :, 8 * row:8 * row + 8, 8 * column:8 * column + 8] = 5.0
    assert torch.equal(tower(images, keep=keep), ours)


def test_images_of_another_size_than_the_position_embedding_are_not_interpolated():
    with pytest.raises(RuntimeError):
        make_clip().vision(torch.zeros(1, 3, 40, 40))


# ----------------------------------------------------------------------------- against transformers

def hugging_face_clip(config):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")

    def tower(name):
        width = getattr(config, f"{name}_width")
        return {"hidden_size": width, "intermediate_size": 4 * width,
                "num_hidden_layers": getattr(config, f"{name}_layers"),
                "num_attention_heads": getattr(config, f"{name}_heads"),
                "hidden_act": "quick_gelu" if config.quick_gelu else "gelu"}

    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=tower("vision") | {"image_size": config.image_size,
                                         "patch_size": config.patch_size},
        text_config=tower("text") | {"max_position_embeddings": config.context_length,
                                     "vocab_size": config.vocab_size,
                                     "bos_token_id": config.vocab_size - 2,
                                     "eos_token_id": config.vocab_size - 1},
        projection_dim=config.embed_dim, attn_implementation="eager"))


@pytest.mark.parametrize("name, config", [
    ("small", SMALL), ("small, quick-GELU", replace(SMALL, quick_gelu=True)),
    ("ViT-B-32", replace(SIZES["ViT-B-32"], quick_gelu=True))], ids=lambda value: str(value)[:17])
def test_embeddings_logits_and_gradients_equal_transformers(name, config):
    from data import weights as foreign
    theirs = hugging_face_clip(config)
    with torch.device("meta"):
        clip = CLIP(config)
    weights = foreign.to_ours("", theirs.state_dict(), clip.state_dict(), "huggingface")
    clip.load_state_dict(weights, assign=True)
    images, tokens = make_batch(replace(config, context_length=20), batch=2)
    output = theirs(input_ids=tokens, pixel_values=images, return_loss=True)
    image_emb, text_emb, scale = clip(images, tokens)
    logits = scale * image_emb @ text_emb.T
    for ours, other in ((image_emb, output.image_embeds), (text_emb, output.text_embeds),
                        (logits, output.logits_per_image)):
        assert (ours - other).norm() <= 1e-5 * other.norm()
    contrastive_loss(image_emb, text_emb, scale).backward()
    output.loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    expected = foreign.to_ours("", grads, clip.state_dict(), "huggingface")
    for n, parameter in clip.named_parameters():  # k's bias has no gradient but rounding
        error = (parameter.grad - expected[n]).norm()
        assert error <= 1e-4 * expected[n].norm() + 1e-7, n


# ------------------------------------------------------------------------------- sizes and starting

@pytest.mark.parametrize("size, count", [  # as counted for OpenAI's and open_clip's models
    ("ViT-B-32", 151_277_313), ("ViT-B-16", 149_620_737), ("ViT-L-14", 427_616_513),
    ("ViT-H-14", 986_109_441)])
def test_parameters_are_as_many_as_clips(size, count):
    with torch.device("meta"):
        clip = CLIP(SIZES[size])
    assert sum(parameter.numel() for parameter in clip.parameters()) == count


def test_starting_weights_are_openais():
    torch.manual_seed(0)
    clip = CLIP(replace(SIZES["toy"], text_width=256, text_heads=4, vision_width=256,
                        vision_heads=4))
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    width, layers = 256, 3
    attn, proj, fc = width ** -0.5, width ** -0.5 * (2 * layers) ** -0.5, (2 * width) ** -0.5
    stds = {"text.token_embedding.weight": 0.02, "text.position_embedding": 0.01,
            "vision.position_embedding": attn, "vision.class_embedding": attn,
            "vision.patch_embed.weight": (3 * 192) ** -0.5}  # uniform +-1/sqrt(192): std a/sqrt(3)
    for tower in ("text", "vision"):
        stds |= {f"{tower}.projection.weight": attn, f"{tower}.blocks.1.qkv.weight": attn,
                 f"{tower}.blocks.1.out.weight": proj, f"{tower}.blocks.1.fc.weight": fc,
                 f"{tower}.blocks.1.proj.weight": proj}
    weights = clip.state_dict()
    for name, std in stds.items():  # three standard errors of a std from n numbers
        error = 3 / math.sqrt(2 * weights[name].numel())
        assert weights[name].std() == pytest.approx(std, rel=error)
    biases = [tensor for name, tensor in weights.items() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_one_seed_gives_one_text_tower_and_loading_draws_nothing(tmp_path):
    torch.manual_seed(1)
    first, then = CLIP(SMALL), torch.rand(3)
    model.write_checkpoint(tmp_path / "v.pt", {
        "format": model.FORMAT, "kind": "vision", "model": asdict(SMALL),
        "weights": make_clip(seed=5).vision.state_dict(), "step": 1, "samples": 1})
    torch.manual_seed(1)
    second = CLIP(SMALL)
    second.vision.load_state_dict(model.load_vision(tmp_path / "v.pt").state_dict())
    assert torch.equal(then, torch.rand(3))
    for name, tensor in first.text.state_dict().items():
        assert torch.equal(tensor, second.text.state_dict()[name])


def test_embeddings_are_of_unit_length_in_fp32_under_autocast():
    clip = make_clip()
    with torch.autocast("cpu", torch.bfloat16):
        image_emb, text_emb, _ = clip(*make_batch())
    for emb in (image_emb, text_emb):
        assert emb.dtype == torch.float32 and emb.shape == (13, SMALL.embed_dim)
        torch.testing.assert_close(emb.norm(dim=1), torch.ones(13), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------- training's helpers

def test_each_parameter_is_in_one_group():
    clip = CLIP(SMALL)
    decayed, plain = model.optimizer_groups(clip, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert sorted(decayed["names"] + plain["names"]) == sorted(dict(clip.named_parameters()))
    assert {re.sub(r"\d+", "i", name.removeprefix("vision.").removeprefix("text."))
            for name in decayed["names"]} == {
        "token_embedding.weight", "patch_embed.weight", "projection.weight",
        *(f"blocks.i.{part}.weight" for part in ("qkv", "out", "fc", "proj"))}
    assert [id(p) for p in plain["params"]] == [id(dict(clip.named_parameters())[name])
                                                for name in plain["names"]]


def test_extra_is_trained_saved_and_copied_but_is_no_part_of_the_model(tmp_path):
    """A parameter, a module and a frozen copy, as recipes hang them on it."""
    clip = make_clip()
    plain = clip.state_dict()
    assert not list(clip.extra.parameters())
    clip.extra.teacher = copy.deepcopy(clip).requires_grad_(False)
    clip.extra.bias = torch.nn.Parameter(torch.tensor(-10.0))
    clip.extra.head = torch.nn.Linear(4, 2)
    clip.extra.position_embedding = torch.nn.Parameter(torch.zeros(3, 4))
    saved = clip.state_dict()
    assert {name.removeprefix("extra.teacher.") for name in saved} >= plain.keys()
    decayed, other = model.optimizer_groups(clip, 0.1)
    assert [name for name in decayed["names"] if "extra" in name] == ["extra.head.weight"]
    assert [name for name in other["names"] if "extra" in name] == [
        "extra.bias", "extra.position_embedding", "extra.head.bias"]
    model.write_checkpoint(tmp_path / "ckpt.pt", {
        "format": model.FORMAT, "kind": "clip", "model": asdict(SMALL), "weights": saved})
    for loaded in (model.load_clip(tmp_path / "ckpt.pt").state_dict(),
                   {f"vision.{name}": tensor for name, tensor in
                    model.load_vision(tmp_path / "ckpt.pt").state_dict().items()}):
        assert loaded and all(torch.equal(plain[name], loaded[name]) for name in loaded)
    assert model.load_clip(tmp_path / "ckpt.pt").state_dict().keys() == plain.keys()


def test_frozen_parameters_are_in_no_group():
    tower = VisionTower(SMALL)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad = "qkv" in name
    names = [name for group in model.optimizer_groups(tower, 0.0) for name in group["names"]]
    assert sorted(names) == sorted(f"blocks.{i}.qkv.{end}" for i in range(3)
                                   for end in ("weight", "bias"))


def test_compiled_text_tower_has_one_graph_for_batches_of_any_lengths():
    """Traced, then run eagerly: what is counted does not depend on the code that is generated."""
    torch._dynamo.reset()
    clip, graphs = make_clip(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    names = list(clip.state_dict())
    clip.text.compile(backend=keep)
    for seed in range(20):
        tokens = make_batch(batch=64 - seed, seed=seed)[1]
        tokens = tokens[tokens.argmax(1) < 20 - seed % 5]  # other sizes and longest captions
        torch.testing.assert_close(clip.text(tokens), plain_text(clip.text, tokens),
                                   rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2  # a block before its attention, and behind it
    assert list(clip.state_dict()) == names


def test_compiled_vision_tower_equals_the_plain_form():
    torch._dynamo.reset()
    clip, images = make_clip(), make_batch()[0]
    clip.vision.compile(backend="eager")  # traced, no code generated
    torch.testing.assert_close(clip.vision(images), plain_image(clip.vision, images),
                               rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------- FLOPs and peaks

def test_flops_of_vit_b_32():
    config = SIZES["ViT-B-32"]
    assert model.flops_per_pair(config) / 1e9 == pytest.approx(44.33, abs=0.01)
    text = model.flops_per_pair(config) - model.flops_per_pair(replace(config, text_layers=0))
    assert text / 3e9 == pytest.approx(5.96, abs=0.005)
    assert (model.flops_per_pair(config) - text) / 3e9 == pytest.approx(8.82, abs=0.005)


@pytest.mark.parametrize("size", ["ViT-B-32", "ViT-L-14"])
def test_flops_are_those_of_the_plain_form(size):
    """torch's own counter counts the matrix products of the plain form, on shapes only."""
    with torch.device("meta"):
        clip = CLIP(SIZES[size])
        images = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            plain_image(clip.vision, images)
            x = torch.empty(1, 77, SIZES[size].text_width)
            x = plain_blocks(clip.text.blocks, x, clip.text.heads, causal=True)
            x[:, 0] @ clip.text.projection.weight.T
    assert 3 * counter.get_total_flops() == model.flops_per_pair(SIZES[size])


def test_fewer_text_tokens_are_fewer_flops():
    config = SIZES["ViT-B-32"]
    assert model.flops_per_pair(config, 20) == model.flops_per_pair(
        replace(config, context_length=20))


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("Some Other GPU", None)])
def test_peak_rates_by_name(name, tera):
    assert model.peak_flops(name) == (tera and tera * 1e12)
