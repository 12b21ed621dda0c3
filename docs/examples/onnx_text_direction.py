"""Is this text upright? A trained classifier in onnx's evaluator, in bnfast's and in onnxruntime.

The package rapidocr-onnxruntime ships a network that tells whether a line of text is upside down.
It is of opset 11 and has 35 batch norms, which onnx's reference evaluator computes wrongly. Here it
looks at random letters and digits, every other image rotated by 180 degrees.

    pip install bnfast[onnx] onnxruntime pillow && pip install --no-deps rapidocr-onnxruntime
    python onnx_text_direction.py --images 8 --picture text-direction.png
"""

from __future__ import annotations

import argparse
import string
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx.reference
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

from bnfast.interop.onnx import ReferenceEvaluator

MODEL = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
WIDTH, HEIGHT, LETTERS = 192, 48, list(string.ascii_letters + string.digits)


def model_file() -> Path:
    """Return where the package has the model; importing the package would need OpenCV."""
    return Path(str(metadata.distribution("rapidocr-onnxruntime").locate_file(MODEL)))


def draw(rng: np.random.Generator, rotated: bool) -> Image.Image:
    """Return an image of two to four random letters and digits, dark on white."""
    text = "".join(rng.choice(LETTERS, rng.integers(2, 5)))
    ink = tuple(rng.integers(0, 128, 3).tolist())
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    font = ImageFont.load_default(float(rng.uniform(24, 34)))
    ImageDraw.Draw(image).text((WIDTH / 2, HEIGHT / 2), text, ink, font, anchor="mm")
    return image.rotate(180) if rotated else image


def as_input(image: Image.Image) -> np.ndarray:
    """Return what the network takes: channels blue, green, red first, from -1 to 1."""
    pixels = np.asarray(image, np.float32)[..., ::-1].transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[np.newaxis]) / 127.5 - 1


def evaluators() -> dict[str, object]:
    """Return the three, each a function from an input to the probability of being rotated."""
    path = str(model_file())
    stock, ours = onnx.reference.ReferenceEvaluator(path), ReferenceEvaluator(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {
        name: lambda x, run=run: float(run(None, {"x": x})[0][0, 1])
        for name, run in (("onnx", stock.run), ("bnfast", ours.run), ("onnxruntime", session.run))
    }


def picture(images: list[Image.Image], found: dict[str, list[float]]) -> Image.Image:
    """Return the images, each beside what is said of it; red is off by 0.01 or more."""
    font, step, column = ImageFont.load_default(15), HEIGHT + 8, 112
    sheet = Image.new("RGB", (WIDTH + 24 + 3 * column, 30 + step * len(images)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 8), "rotated? probability by", "black", font)
    for place, (name, values) in enumerate(found.items()):
        left = WIDTH + 24 + place * column
        pen.text((left, 8), name, "black", font)
        for row, (value, right) in enumerate(zip(values, found["onnxruntime"], strict=True)):
            colour = "firebrick" if abs(value - right) >= 0.01 else "black"
            pen.text((left, 30 + row * step + HEIGHT / 2 - 8), f"{value:.3f}", colour, font)
    for row, image in enumerate(images):
        sheet.paste(image, (10, 30 + row * step))
    return sheet.quantize(64)


def main() -> None:
    """Show the images to all three."""
    parser = argparse.ArgumentParser(description="Three evaluators on images of text.")
    for name, default in (("--images", 50), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default, metavar="N")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    rng, runs = np.random.default_rng(options.seed), evaluators()
    images = [draw(rng, rotated=number % 2 == 1) for number in range(options.images)]
    found = {name: [run(as_input(image)) for image in images] for name, run in runs.items()}
    print(f"{'image':6}  rotated  {'onnx':>8}  {'bnfast':>8}  onnxruntime")
    for number, row in enumerate(zip(*found.values(), strict=True)):
        print(f"{number:6}  {'ny'[number % 2]:>7}  {row[0]:8.5f}  {row[1]:8.5f}  {row[2]:11.5f}")
    for name in ("onnx", "bnfast"):
        off = np.abs(np.subtract(found[name], found["onnxruntime"]))
        print(f"{name}: off by {off.max():.1e} at most, by 0.01 or more on {(off >= 0.01).sum()}")
    if options.picture:
        picture(images, found).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
