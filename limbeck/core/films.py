"""Films as strips [B, C, T W, W]: their T pictures, each W x W, one below the other, so that they are pictures, too."""

from torch import Tensor

from limbeck.core.errors import BadInput


def frames_of(films: Tensor) -> Tensor:
    """Strips [B, C, T W, W] as pictures [B, T, C, W, W]. Raises BadInput when they are no square pictures."""
    tall, wide = films.shape[2:]
    if tall % wide:
        raise BadInput(f"a film is a strip of square pictures [B, C, T W, W], got {list(films.shape)}")
    frames: Tensor = films.unflatten(2, (tall // wide, wide)).transpose(1, 2)
    return frames


def strip_of(frames: Tensor) -> Tensor:
    """Pictures [B, T, C, W, W] as strips [B, C, T W, W]."""
    return frames.transpose(1, 2).flatten(2, 3)


def marks(films: Tensor) -> Tensor:
    """The pixels of every picture of strips: [B, C, T W, W] -> [B, T, C W W]."""
    return frames_of(films).flatten(2)
