"""The peak memory of a training step, predicted from what its backward pass keeps. No torch needed.

Three kinds of bytes: what stays (weights, Adam's moments, and on a GPU the batch), what each block keeps between its
forward and its backward pass, and what is held only while one operation runs. The peak is the largest of the moments
where it can be: the head's softmax, and the backward pass of each block, when gradients of the blocks behind it exist
already and the activations of those before it are still kept. tests/model/test_memory.py holds it to the allocator.

T slots, S places after documents were stacked for attention (CPU), P patches, n targets, D width, F feed-forward hidden
"""

from __future__ import annotations

from dataclasses import dataclass

from isofusion.config import ModelConfig
from isofusion.model.count import BatchShape, count_parameters

HEAD_CHUNK = 2**24
"""Most logits (slots x vocabulary) held at once on a CPU; 64 MiB in float32."""
HEAD_CHUNK_GPU = 2**28
"""The same on a GPU, whose products want more rows: 1 GiB."""
HEAD_KEPT_GPU = 2**31 - 1
"""Most logits whose gradient `head_loss` keeps on a GPU, in bf16: 4 GiB, and what 32 bits number."""
LOGITS = 2**19
"""Logits of one piece of `head_loss` on a CPU: 2 MiB in float32, about what second-level caches hold."""
LOGITS_GPU = 2**26
"""The same on a GPU where nothing is compiled: 256 MiB in float32."""
ROUND = 16
"""On a CPU slots are filled up to a multiple of this, and where a product is oneDNN's also its targets or the tokens of
an expert: oneDNN compiles a kernel for every new shape, about 0.3 ms each, and keeps a thousand."""
IMAGE_SHARE = 0.544
"""Share of patches among the tokens of the paper's mixture, where no batch says otherwise."""
DOCUMENT = 256  # slots of a document, where no batch says otherwise: it sets the size of the masks on a CPU
PADDED = 1.06  # places per slot after documents were stacked by length (DocumentPlan) on the built-in world


@dataclass(frozen=True)
class Layer:
    """Bytes of one block: kept until its backward pass, held at that pass's worst moment, and of its gradients."""

    kept: float
    held: float
    gradients: float
    enters: float  # its input, all that a recomputed block keeps


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of a step. `gradients`: of them a rank has its share alone; `unsummed`: whole ones, before
    they are summed over ranks; `gathered`: of the other ranks' weights.
    """

    kept: float
    held: float
    gradients: float
    unsummed: float
    gathered: float

    def total(self, shards: int) -> float:
        return self.kept + self.held + self.gradients / shards + self.unsummed + (self.gathered if shards > 1 else 0.0)


def nominal_shape(slots: int) -> BatchShape:
    """A batch of the paper's mixture."""
    patches = round(IMAGE_SHARE * slots)
    return BatchShape(slots - patches, patches, patches // 256, slots - patches, slots * DOCUMENT // 2)


def _block(
    slots: float,
    places: float,
    width: int,
    hidden: int,
    heads: int,
    weights: float,
    size: float,
    cpu: bool,
    native: bool,
    compiled: bool,
    experts: int = 0,
    top_k: int = 1,
    real: float = 0.0,
    router: bool = False,
) -> Layer:
    """`size`: bytes of a number in a product; `weights`: parameters in products; `real`: slots without padding;
    `router`: experts are chosen by one.
    """
    t_d, s_d, t_f = slots * width, places * width, slots * hidden
    if native:  # the logsumexp of each score row; its weights are computed again
        attention = 4 * slots * heads
    else:  # q, k, v, the result, its logsumexp
        attention = 4 * s_d * (4.0 if cpu else size) + 4 * places * heads
    copies = weights * (2.0 if size == 2 and not native else 0.0)  # in bf16, which live as long as the graph
    compiled = compiled and not native
    if compiled:
        # the residual stream, what attention's projections read and return, the scales of its norm and of q and k; what
        # lies between the projections of the feed-forward; all else the compiler computes again
        kept = t_d * (4 + 4 * size) + attention + 8 * slots * (1 + heads)
    else:
        kept = 2 * (t_d * (4 + size) + 4 * slots)  # two norms: what they read, what the product reads, one scale a slot
        kept += 3 * t_d * size + attention + t_d * size  # the projection, and the result in order
    if not experts:
        kept += t_f * size * 3 + (t_d * size if compiled else 0.0)  # gate, up, product; what they read
        held = t_f * size * 3 + 4 * t_d + (t_d * size if size == 2 and not compiled else 0.0)
        return Layer(kept + copies, held, 4.0 * weights, 4 * t_d)
    rows = (real if cpu else slots) * top_k + (experts * (ROUND - 1) if cpu and size == 2 and not native else 0)
    kept += rows * width * size * 2 + rows * hidden * size * 3  # rows in and out, gate, up, product
    kept += slots * top_k * 24 + rows * 20  # choices, order
    if router:  # its probabilities, and what it reads in float32
        kept += slots * experts * 4 + (t_d * 4 if size == 2 and not native and not compiled else 0)
    held = rows * hidden * size * 3 + 4 * t_d + rows * width * size
    return Layer(kept + copies, held, 4.0 * weights, 4 * t_d)


def memory_bytes(
    cfg: ModelConfig,
    slots: int,
    precision: str = "fp32",
    shape: BatchShape | None = None,
    device: str = "cpu",
    recompute: int = 0,
    compiled: bool | None = None,
    native: bool = True,
    shards: int = 1,
) -> dict[str, float]:
    """Bytes of one device at the worst moment of a step, by what they are for; "total" is their sum.

    `slots` of one micro-batch, padding included (on a CPU it costs nothing); `shape`: what it holds (default: the
    paper's mixture, no padding).
    `recompute`: blocks whose activations are computed again in the backward pass. `compiled`: a GPU's default.
    `native`: on a CPU, whether the kernels of native.py run (in bf16: its products too). `shards`: ranks that keep a
    part each of weights, moments and gradients; "whole" is then what one gathers of the others' parts (embedding and
    head from the forward to the end of the backward pass, two blocks at a time) and a block's gradient before it is
    summed.
    """
    shape = shape or nominal_shape(slots)
    cpu = device == "cpu"
    compiled = (not cpu) if compiled is None else compiled
    size = 4.0 if precision == "fp32" else 2.0
    n = count_parameters(cfg)
    d, patches = cfg.width, shape.image_tokens
    real = float(shape.text_tokens + shape.image_tokens)
    if cpu:  # padding is left out (PackedBatch.without_padding)
        slots = min(slots, round(-(-real // ROUND) * ROUND))
    native = native and cpu
    places = slots * PADDED if cpu and not native else slots
    attention, ffn = 4 * d * d, 3 * d * cfg.hidden()
    inside = attention + ffn * max(1, cfg.n_experts) + (cfg.n_experts * d if cfg.routing == "agnostic" else 0)
    how = (size, cpu, native, compiled)
    moe = (cfg.n_experts, cfg.top_k, real, cfg.routing == "agnostic")
    block = _block(slots, places, d, cfg.hidden(), cfg.n_heads, inside, *how, *moe)
    layers = [block] * cfg.depth
    if cpu and not native:  # where each slot goes and comes from, the table of rotations, the masks of the documents
        shared = 8.0 * places + 8.0 * slots + 8.0 * slots * d + 8.0 * shape.attention_pairs
    else:
        shared = 4.0 * slots * cfg.head_dim
    front = patches * cfg.patch_dim * size
    if cfg.fusion == "late":
        assert cfg.encoder_width is not None
        e, heads = cfg.encoder_width, cfg.encoder_width // cfg.encoder_head
        weights = 4 * e * e + 3 * e * cfg.hidden(e)
        tower = _block(patches, patches, e, cfg.hidden(e), heads, weights, *how)
        layers = [tower] * cfg.encoder_layers + layers
        front += patches * e * (4 + size) + patches * (e * 8.0 if cpu and not native else cfg.encoder_head * 4.0)
    if recompute:
        again = [Layer(b.enters, b.kept + b.held, b.gradients, b.enters) for b in layers[:recompute]]
        layers = again + layers[recompute:]
    # the head: input and result of the last norm, rows with a target
    top = slots * d * (4 + size) + shape.targets * d * 8.0
    chunk = HEAD_CHUNK if cpu else HEAD_KEPT_GPU if size == 2 else HEAD_CHUNK_GPU
    logits = 4.0 * min(shape.targets * cfg.vocab_size, chunk)
    softmax = 3 * logits
    if size == 2:
        # head_loss: gradient of the logits in bf16, and the weights' gradient or one piece of the logits in float32
        ends, piece = cfg.vocab_size * d, min(LOGITS if cpu else 0.0 if compiled else LOGITS_GPU, logits / 4)
        softmax = logits / 2 + (4 * ends if native else 2 * ends + max((10.0 if cpu else 17.0) * piece, 6.0 * ends))
    kept = shared + front + top + sum(b.kept for b in layers)
    head = 4.0 * cfg.vocab_size * d  # bytes of its gradient, as of the embedding's; there at its second chunk
    chunked = shape.targets * cfg.vocab_size > chunk
    moments = [Moment(kept, softmax, 0.0, head if chunked else 0.0, 2 * head + 2 * layers[-1].gradients)]
    gradients = 0.0
    for layer in reversed(layers):
        before = kept - (0.0 if layer is layers[-1] else top)
        moments.append(Moment(before, layer.held, gradients, head, 2 * head + 3 * layer.gradients))
        kept -= layer.kept
        gradients += layer.gradients
    moments.append(Moment(kept - top, 0.0, 4.0 * n.n_total - 2 * head, 2 * head, 2 * head))
    worst = max(moments, key=lambda moment: moment.total(shards))
    batch = 0.0 if cpu else slots * 40.0 + patches * (cfg.patch_dim + 8.0)
    parts = {
        "weights": 4.0 * n.n_total / shards,
        "adam": 8.0 * n.n_total / shards,
        "gradients": worst.gradients / shards + worst.unsummed,
        "activations": worst.kept,
        "transient": worst.held,
        "batch": batch,
    }
    if shards > 1:
        parts["whole"] = worst.gathered
    parts["total"] = sum(parts.values())
    return parts
