"""Makes the data that ships inside the package, from a folder of full data sets.

    LIMBECK_DATA=folder python tools/embed_data.py

Reads fashion_mnist/fashion_mnist.npz and tinyshakespeare/input.txt[.zst]; writes limbeck/zoo/fashion_mnist_small.npz,
limbeck/zoo/shakespeare_small.txt.bz2 and limbeck/zoo/embedded.json. The same input gives the same bytes.
"""

import argparse
import bz2
import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from limbeck.adapters.readers import read

ZOO = Path(__file__).parent.parent / "limbeck" / "zoo"
LICENCE = """The MIT License (MIT) Copyright © 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the “Software”), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED “AS IS”, WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""  # noqa: E501
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def balanced(labels: np.ndarray, each: int) -> np.ndarray:
    """The first `each` examples of every class, class after class in turn, so that any head of them is balanced too."""
    return np.stack([np.flatnonzero(labels == c)[:each] for c in range(labels.max() + 1)], 1).ravel()


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """An npz file that numpy reads as any other, with LZMA inside: a tenth smaller than its own compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, member.getvalue())
    return out.getvalue()


def main() -> int:
    """Write the three files and say how large they are."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--train", type=int, default=700, help="training images a class")
    options.add_argument("--test", type=int, default=250, help="test images a class")
    options.add_argument("--characters", type=int, default=700_000, help="characters of Shakespeare, cut at a speech")
    chosen = options.parse_args()
    source = Path(os.environ["LIMBECK_DATA"])
    parts = read(source / "fashion_mnist" / "fashion_mnist.npz")
    arrays: dict[str, np.ndarray] = {}
    for part, each in (("train", chosen.train), ("test", chosen.test)):
        labels = np.asarray(parts[part].labels)
        rows = balanced(labels, each)
        arrays[f"x_{part}"] = np.ascontiguousarray(parts[part].inputs[rows].transpose(0, 2, 1))
        arrays[f"y_{part}"] = labels[rows].astype(np.uint8)
    images = packed(arrays)
    white = arrays["x_train"] / 255.0
    whole = read(source / "tinyshakespeare")["all"].inputs[0]
    text = whole[: whole.rindex("\n\n", 0, chosen.characters) + 2]
    pressed = bz2.compress(text.encode(), 9)
    record = {
        "fashion_mnist_small": {
            "file": "fashion_mnist_small.npz",
            "sha256": hashlib.sha256(images).hexdigest(),
            "bytes": len(images),
            "what": f"The first {chosen.train} training and {chosen.test} test images of each class of Fashion-MNIST, "
            "28x28 grey, stored with rows and columns swapped (it packs better)",
            "counts": {"train": len(arrays["y_train"]), "test": len(arrays["y_test"])},
            "classes": CLASSES,
            "mean": [round(float(white.mean()), 6)],
            "std": [round(float(white.std()), 6)],
            "source": "https://github.com/zalandoresearch/fashion-mnist (Xiao et al. 2017, arXiv 1708.07747)",
            "licence": LICENCE,
        },
        "shakespeare_small": {
            "file": "shakespeare_small.txt.bz2",
            "sha256": hashlib.sha256(pressed).hexdigest(),
            "bytes": len(pressed),
            "what": "The beginning of tinyshakespeare, parts of plays by William Shakespeare, as plain text",
            "counts": {"characters": len(text)},
            "source": "https://github.com/karpathy/char-rnn data/tinyshakespeare",
            "licence": "The text is in the public domain.",
        },
    }
    (ZOO / "fashion_mnist_small.npz").write_bytes(images)
    (ZOO / "shakespeare_small.txt.bz2").write_bytes(pressed)
    (ZOO / "embedded.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(images):,} bytes of images, {len(pressed):,} bytes of text\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
