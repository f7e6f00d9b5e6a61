"""How a number is written, once for every table, sentence and plot: percent, points, parameters, bytes, times."""

import math
import re

SPACE = "\u00a0"  # a unit never wraps away from its number
MINUS = "\u2212"
ABSENT = "\u2013"

# Metrics kept as fractions of 1; they are shown in percent, and their differences in percentage points.
FRACTIONS = frozenset(
    "accuracy acc top1 top5 agreement f1 precision recall iou miou map ap auc auroc ece calibration mrr "
    "forgetting attack".split()
)
LOWER = frozenset(
    "frechet fid kid mmd loss nll perplexity ppl error ece calibration mse mae rmse latency seconds bytes brier "
    "divergence forgetting kl distance wer cer attack exposure".split()
)
NAMES = {
    "frechet": "Fréchet distance",
    "frechet_distance": "Fréchet distance",
    "fid": "FID",
    "map": "mAP",
    "auroc": "AUROC",
    "kid": "KID",
    "ece": "calibration error",
    "calibration": "calibration error",
    "nll": "negative log-likelihood",
    "miou": "mIoU",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "latency_ms": "latency",
    "nfe": "network evaluations",
}


def tokens(metric: str) -> list[str]:
    """'val/top1_accuracy' -> ['val', 'top1', 'accuracy']."""
    return [t for t in re.split(r"[^a-z0-9]+", metric.lower()) if t]


def is_fraction(metric: str) -> bool:
    """True for accuracy and its kin: values in [0, 1], shown in percent."""
    return any(t in FRACTIONS for t in tokens(metric))


def lower_is_better(metric: str) -> bool:
    """What a metric's name says of its direction, for results that do not say it themselves."""
    return any(t in LOWER for t in tokens(metric))


def pretty(metric: str) -> str:
    """A metric's name as it is read: 'frechet' -> 'Fréchet distance', 'top1_drop' -> 'top1 drop'."""
    return NAMES.get(metric, re.sub(r"[_./]+", " ", metric).strip())


def minus(text: str) -> str:
    """The typographic minus in front of a negative number."""
    return MINUS + text[1:] if text.startswith("-") else text


def strange(value: float | None) -> str:
    """The word for what is not a finite number, or '' for one that is."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else MINUS + "infinite"
    return ""


def plain(value: float | None) -> str:
    """Three significant digits, thousands grouped: 12,345 · 123 · 12.3 · 1.23 · 0.123 · 1.2e-05."""
    if value is None or strange(value):
        return strange(value)
    size = abs(value)
    if value == int(value) and size < 1e15:
        return minus(f"{int(value):,}")
    if size >= 1e9 or size < 1e-3:
        return minus(f"{value:.1e}")
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return minus(f"{value:,.{decimals}f}")


def points(value: float) -> str:
    """A difference of fractions in percentage points: one decimal, more only where one would round it to nothing."""
    scaled = 100 * value
    if abs(scaled) >= 0.095 or scaled == 0:
        return minus(f"{scaled:.1f}")
    # Below a ten-thousandth of a point nothing is meant any more (float noise of equal accuracies).
    return "0.0" if abs(scaled) < 1e-4 else minus(f"{scaled:.{1 - math.floor(math.log10(abs(scaled))) - 1}f}")


def bare(metric: str, value: float | None) -> str:
    """A metric's value without its unit, for a column whose head names the unit."""
    if value is None or strange(value):
        return strange(value)
    return minus(f"{100 * value:.1f}") if is_fraction(metric) else plain(value)


def unit(metric: str) -> str:
    """The unit of a metric's value: '%', 'ms', 's' or ''."""
    if is_fraction(metric):
        return "%"
    last = (tokens(metric) or [""])[-1]
    return {"ms": "ms", "seconds": "s", "percent": "%"}.get(last, "")


def value(metric: str, number: float | None) -> str:
    """A metric's value with its unit: '81.3 %', '14.2', '1.20 ms'."""
    text = bare(metric, number)
    return text + SPACE + unit(metric) if unit(metric) and not strange(number) else text


def amount(metric: str, difference: float) -> str:
    """The size of a difference, unsigned: '1.2 points', '14.2'."""
    if strange(difference):
        return strange(difference)
    if is_fraction(metric):
        return points(abs(difference)) + SPACE + "points"
    return value(metric, abs(difference))


def gained(metric: str, gain: float, higher_is_better: bool) -> str:
    """A gain (positive is better) in the reader's direction: '+1.2 points', or '14.2 lower' where lower is better."""
    if strange(gain):
        return strange(gain)
    if not higher_is_better:
        return amount(metric, gain) + SPACE + ("lower" if gain >= 0 else "higher")
    return sign(gain) + amount(metric, gain)


def sign(number: float) -> str:
    """'+', a true minus, or nothing for zero."""
    return "+" if number > 0 else MINUS if number < 0 else ""


def between(metric: str, low: float, high: float, higher_is_better: bool) -> str:
    """An interval of a gain: '+0.4 to +2.0', '10.1 to 18.3 lower', '0.6 higher to 3.0 lower'; '' when there is none."""
    if strange(low) or strange(high):
        return ""
    if higher_is_better:
        low_text, high_text = (sign(x) + bare_amount(metric, x) for x in (low, high))
        return f"{low_text} to {high_text}"
    low_way, high_way = ("lower" if x >= 0 else "higher" for x in (low, high))
    if low_way == high_way:
        small, large = sorted((low, high), key=abs)
        return f"{bare_amount(metric, small)} to {bare_amount(metric, large)} {low_way}"
    return f"{bare_amount(metric, low)} {low_way} to {bare_amount(metric, high)} {high_way}"


def with_interval(metric: str, mean: float, low: float | None, high: float | None, higher_is_better: bool) -> str:
    """'+2.8 points [+0.8 to +4.8]'; without the brackets where the bounds are unknown, as with one seed."""
    text = gained(metric, mean, higher_is_better)
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return text
    return f"{text} [{between(metric, low, high, higher_is_better)}]"


def bare_amount(metric: str, difference: float) -> str:
    """The size of a difference without its unit."""
    return points(abs(difference)) if is_fraction(metric) else bare(metric, abs(difference))


def half(metric: str, value: float, width: float) -> str:
    """The x of 'value ± x', with as many decimals as the value has beside it."""
    shown = bare(metric, value)
    if is_fraction(metric) or "e" in shown:
        return bare_amount(metric, width)
    return f"{width:,.{len(shown.partition('.')[2])}f}" if float(f"{width:.3g}") else "0"


def parameters(count: float | None) -> str:
    """12,345 · 1.23 M · 7.00 B."""
    if count is None or strange(count):
        return strange(count)
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(count) >= size:
            return f"{count / size:.3g}{SPACE}{letter}"
    return f"{count:,.0f}"


def size(count: float | None) -> str:
    """Bytes in decimal units: 49.4 kB."""
    if count is None or strange(count):
        return strange(count)
    for step, letters in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= step:
            return f"{count / step:.3g}{SPACE}{letters}"
    return f"{count:.0f}{SPACE}B"


def milliseconds(number: float | None) -> str:
    """1.20 ms, 340 µs, 2.10 s."""
    if number is None or strange(number):
        return strange(number)
    if 0 < number < 1:
        return f"{number * 1000:.3g}{SPACE}µs"
    return f"{number:.3g}{SPACE}ms" if number < 1000 else f"{number / 1000:.3g}{SPACE}s"


def duration(seconds: float | None) -> str:
    """0.4 s · 8.2 s · 73 s · 2 min 40 s · 3 h 05 min."""
    if seconds is None or strange(seconds):
        return strange(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole}{SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{SPACE}min{SPACE}{whole % 60:02d}{SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60:02d}{SPACE}min"


def sentence(text: str) -> str:
    """The text with a capital first letter, unless its own spelling has capitals further on (mIoU)."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]


def times(ratio: float, more: str, less: str, same: str) -> str:
    """'8.3x smaller', '1.4x larger' or 'same size': ratio > 1 is `more`."""
    if not math.isfinite(ratio) or ratio <= 0:
        return ABSENT
    if 0.98 < ratio < 1.02:
        return same
    factor, word = (ratio, more) if ratio > 1 else (1 / ratio, less)
    return (f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}" if factor >= 1.1 else f"{factor:.2f}") + f"× {word}"
