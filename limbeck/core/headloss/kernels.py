# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The comparison of a tile of logits as one Triton kernel; `fused` says when, this file is imported only there.

One program reads one row: once for the normalisers, once for the sums of value and slope where the latter is not known
beforehand, once to write the gradient over the student's logits. The formulas are those of `divergences`, in fp32.
"""

import triton
import triton.language as tl

FLOOR: tl.constexpr = tl.constexpr(-1e19)  # as in `core.maths`
FAR: tl.constexpr = tl.constexpr(80.0)  # as in `divergences`


@triton.jit
def beyond(x):
    """e^x - 1 - x for |x| <= 1/2, without cancellation."""
    x = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8 * (1 + x / 9)))
    return x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series)))


@triton.jit
def expm1(x):
    """e^x - 1, also close to 0."""
    return tl.where(tl.abs(x) < 0.5, x + beyond(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """The rounding of 1 + x is divided out again; there is no such function in Triton's interpreter."""
    u = 1 + x
    off = u - 1
    same = off == 0
    return tl.where(same, x, tl.log(u) * (x / tl.where(same, 1.0, off)))


@triton.jit
def kl(p, q, d):
    """Terms of KL(p || q), d = log q - log p: p (e^d - 1 - d) >= 0."""
    return tl.where(tl.abs(d) < 0.5, p * beyond(d), q - p - p * d)


@triton.jit
def between(x, low, high):
    """As clamp: nan stays nan, which minimum and maximum would lose."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def terms(log_q, log_p, knob, KIND: tl.constexpr):
    """Value and slope at each word, by the name of a function in `divergences`."""
    q, p, d = tl.exp(log_q), tl.exp(log_p), log_q - log_p
    if KIND == "cross_entropy":
        value, slope = -p * log_q, -p
    elif KIND == "forward_kl":
        value, slope = kl(p, q, d), -p
    elif KIND == "reverse_kl":
        value, slope = kl(q, p, -d), q * d
    elif KIND == "js":
        d = between(d, -FAR, FAR)
        over_m = -log1p(knob * expm1(-d))
        slope = (1 - knob) * q * over_m
        value = slope + knob * p * (over_m - d)
    elif KIND == "skew_kl":
        over_p = log1p((1 - knob) * expm1(between(d, FLOOR, FAR)))
        value = kl(p, knob * p + (1 - knob) * q, over_p)
        slope = (knob - 1) * q * tl.exp(-over_p)
    elif KIND == "skew_reverse_kl":
        over_q = log1p((1 - knob) * expm1(-between(d, -FAR, -FLOOR)))
        value = kl(q, knob * q + (1 - knob) * p, over_q)
        slope = -q * (knob * tl.exp(-over_q) + over_q)
    else:
        tl.static_assert(KIND == "total_variation")
        value = 0.5 * tl.abs(q - p)
        slope = tl.where(q > p, 0.5, tl.where(q < p, -0.5, q - p)) * q
    return value, slope


@triton.jit
def read(x, at, words):
    """Logits of a row, -inf behind its end."""
    return tl.load(x + at, mask=at < words, other=float("-inf")).to(tl.float32)


@triton.jit
def normaliser(x, words, rate, BLOCK: tl.constexpr):
    """The largest logit of a row, and log sum exp(rate (x - largest)): every lane for itself, then all together."""
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, words, BLOCK):
        here = read(x, start + tl.arange(0, BLOCK), words)
        higher = tl.maximum(top, here)
        total = total * tl.exp(rate * (top - higher)) + tl.exp(rate * (here - higher))
        top = higher
    largest = tl.max(top, 0)
    return largest, tl.log(tl.sum(total * tl.exp(rate * (top - largest)), 0))


@triton.jit
def log_softmax(x, rate, largest, log_total):
    """At least `FLOOR`, and nan where x is."""
    log = rate * (x - largest) - log_total
    return tl.where(log < FLOOR, FLOOR, log)


@triton.jit
def compare(
    z,  # logits of the student [n, words]; with GRADIENT, the gradient to its sum of products afterwards
    t,  # logits of the teacher [n, words]
    z_stride,
    t_stride,
    words,
    labels,
    values,  # [n] of the term against the teacher
    label_values,
    weights,  # [n] its weights over its temperature
    label_weights,
    rate,  # 1 / temperature
    label_rate,
    knob,
    scale,
    softcap,
    KIND: tl.constexpr,  # "" for no term against the teacher
    LABELS: tl.constexpr,  # whether there is cross-entropy with the labels
    SUM: tl.constexpr,  # whether the value and the sum of the slopes, else -1, take a pass of their own
    GRADIENT: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of `tiles.compare`, by the program of its number."""
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    total = tl.full([BLOCK], 0.0, tl.float32)
    slopes = -1.0
    if LABELS:
        label = tl.load(labels + row)
        of_label = tl.load(z + label).to(tl.float32)  # before the sums, whose barriers keep it ahead of what is written
        z_top, label_norm = normaliser(z, words, label_rate, BLOCK)
        tl.store(label_values + row, -log_softmax(of_label, label_rate, z_top, label_norm))
    if KIND != "":
        z_top, z_norm = normaliser(z, words, rate, BLOCK)
        t_top, t_norm = normaliser(t, words, rate, BLOCK)
        if SUM:
            slope_total = tl.full([BLOCK], 0.0, tl.float32)
            for start in range(0, words, BLOCK):
                at = start + tl.arange(0, BLOCK)
                log_q = log_softmax(read(z, at, words), rate, z_top, z_norm)
                log_p = log_softmax(read(t, at, words), rate, t_top, t_norm)
                value, slope = terms(log_q, log_p, knob, KIND)
                total += value
                slope_total += slope
            slopes = tl.sum(slope_total, 0)
    if GRADIENT:
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            here = read(z, at, words)
            grad = tl.full([BLOCK], 0.0, tl.float32)
            if KIND != "":
                log_q = log_softmax(here, rate, z_top, z_norm)
                log_p = log_softmax(read(t, at, words), rate, t_top, t_norm)
                value, slope = terms(log_q, log_p, knob, KIND)
                if not SUM:
                    total += value
                grad += tl.load(weights + row) * (slope - tl.exp(log_q) * slopes)
            if LABELS:
                log_q = log_softmax(here, label_rate, z_top, label_norm)
                grad += tl.load(label_weights + row) * (tl.exp(log_q) - tl.where(at == label, 1.0, 0.0))
            if CAPPED:
                grad *= 1 - (here / softcap) * (here / softcap)
            tl.store(z + at, scale * grad, mask=at < words)
    if KIND != "":
        value = tl.sum(total, 0)
        if KIND != "cross_entropy":
            value = tl.where(value < 0, 0.0, value)
        tl.store(values + row, value)
