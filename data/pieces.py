"""One training step in pieces that fit in memory: micro-batches, and chunks of the loss.

pretrain.py has the plain forms; these give the same loss and gradient, which tests hold.
"""
import contextlib

import torch


def cached_gradient(model, parts, loss_of, ranks):
    """Leave in .grad the gradient of a batch of which one micro-batch at a time is in memory.

    GradCache, arXiv 2101.06983. model: part -> {name: rows (micro, ...) or a scalar ()}; parts:
    the micro-batches; loss_of: rows of all parts {name: (b, ...) or ()} -> loss ().
    Returns loss and rows, without a graph.
    """
    # 1. Encode all parts without a graph.
    with torch.no_grad():
        outputs = [model(part) for part in parts]
    rows = {}
    for name, first in outputs[0].items():
        rows[name] = torch.cat([output[name] for output in outputs]) if first.ndim else first
    # 2. The loss of all, and its gradient at the rows; zeros where it does not use one.
    floats = {}
    for name, row in rows.items():
        if row.is_floating_point():
            floats[name] = row.requires_grad_()
    loss = loss_of(rows)
    grads = torch.autograd.grad(loss, list(floats.values()), materialize_grads=True)
    # 3. Encode each part again and push its share of that gradient through.
    start = 0
    for number, part in enumerate(parts, 1):
        last = ranks.world == 1 or number == len(parts)
        with contextlib.nullcontext() if last else model.no_sync():  # DDP averages once
            output = model(part)
            end = start + len(part["samples"])
            used, shares = [], []
            for name, grad in zip(floats, grads):
                if output[name].requires_grad:  # frozen towers and teachers have no graph
                    used.append(output[name])
                    shares.append(grad[start:end] if grad.ndim else grad / len(parts))
            torch.autograd.backward(used, shares)
        start = end
    return loss.detach(), {name: row.detach() for name, row in rows.items()}


class ChunkedLoss(torch.autograd.Function):
    """A contrastive loss `chunk` rows at a time: only chunk x B logits exist at once.

    ChunkedLoss.apply(loss_function, chunk, *arguments of pretrain.contrastive_loss). Forward
    takes the gradient of each chunk right away, so that its logits can go, and keeps the sum.
    """

    @staticmethod
    def forward(ctx, loss_function, chunk, image, text, all_image, all_text, scale, first_row):
        leaves = []
        for tensor in (image, text, all_image, all_text, scale):
            leaves.append(tensor.detach().requires_grad_())
        image, text, all_image, all_text, scale = leaves
        b, loss = len(image), 0.0
        for start in range(0, b, chunk):
            rows = slice(start, min(start + chunk, b))
            with torch.enable_grad():
                part = loss_function(image[rows], text[rows], all_image, all_text, scale,
                                     first_row + start)
                part = part * (rows.stop - rows.start) / b  # a mean over rows
                part.backward()  # adds to the leaves' gradients
            loss = loss + part.detach()
        ctx.save_for_backward(*[leaf.grad for leaf in leaves])
        return loss

    @staticmethod
    def backward(ctx, grad):
        image, text, all_image, all_text, scale = ctx.saved_tensors
        return (None, None, grad * image, grad * text, grad * all_image, grad * all_text,
                grad * scale, None)
