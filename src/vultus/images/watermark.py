"""An invisible watermark without content, which says that vultus generated the image; and its detector.

A pattern that repeats every TILE pixels is added to the brightness (spread spectrum, Cox et al. 1997). It consists of
waves of fixed random phases between 0.1 and 0.25 cycles per pixel, which partly survive JPEG compression and reduction
to half the size. Its local amplitude is proportional to the texture around a pixel. The pattern is shifted to the
position where it correlates best with the image. The strength of each wave depends on how much of it the image already
contains: the waves are amplified until the detector's score is TARGET (informed embedding, Malvar and Florêncio 2003).

The detector whitens the brightness (multiplication by a power of the frequency in the cosine transform, then division
by the local deviation), extracts the frequencies of the pattern, at several scales for stretched images, and correlates
them with the pattern and its mirror image at every shift. The score is the largest correlation in units of its standard
deviation. On real faces it follows a Gumbel distribution, which converts it into a p-value.

There is no key and no message: whoever has this file can detect the watermark, and remove or forge it. Other libraries
do not fit faces of 128x128: invisible-watermark rejects images below 256x256, blind-watermark needs to know how an
image was cropped and cannot report that there is no watermark, TrustMark needs torch, Lightning and a download.

This module does not import torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]
Complex = NDArray[np.complexfloating[Any, Any]]
Pixels = NDArray[np.uint8]

TILE = 32  # pixels after which the pattern repeats
BAND, MIDDLE = (0.1, 0.25), 0.15  # cycles per pixel
SIDE = 128  # of the blocks that are marked and examined
LEAST = 64  # smaller images are not marked: a side would have less than two tiles
TARGET = 7.8  # the score of a marked block
ROOM = 8  # distance to black and white in grey levels from which on the watermark has its full strength
LEAST_WAVE = 0.5  # of the root mean square
STEP, STEPS = 0.08, 40  # of the embedding; STEP in root mean squares of the waves
FLOOR = 6.0  # grey levels; lower bound of the local deviation, for uniform areas
CUT = 0.3  # cycles per pixel; higher frequencies are removed by the whitening
NEAR = 4  # pixels in each direction over which the local deviation is computed
WHITE = 1.8  # the exponent: amplitudes of faces decrease with the frequency by this power
SCALES = tuple(1 + 0.0185 * step for step in range(7))  # up to 1 / 0.9: a tenth cropped, stretched back
WINDOWS = 100  # blocks of a large image that are examined, at most
# Gumbel distribution of the score of a block of a real face; see docs/marks.md.
LOCATION, SPREAD = 4.19, 0.2425
ALARM = 1e-3  # p-value below which the watermark counts as found

_K = math.floor(BAND[1] * TILE)
_NUMBERS = np.arange(-_K, _K + 1)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _make_waves() -> Complex:
    """Amplitudes [2K+1, 2K+1] of the pattern at frequencies k / TILE; conjugate at -k, so that it is real."""
    length = np.hypot(_NUMBERS[:, None], _NUMBERS) / TILE
    # The raw stream is the same in every version of numpy (NEP 19 guarantees it for bit generators).
    raw = np.random.Philox(key=2015).random_raw(length.size).reshape(length.shape)
    waves = np.exp(2j * np.pi * (raw >> np.uint64(11)).astype(np.float64) / 2**53)
    upper = (_NUMBERS[:, None] > 0) | ((_NUMBERS[:, None] == 0) & (_NUMBERS > 0))
    waves = np.where(upper & (length >= BAND[0]) & (length <= BAND[1]), waves, 0)
    return (waves + waves[::-1, ::-1].conj()).astype(np.complex64)


_WAVES = _make_waves()
_USED = np.abs(_WAVES) > 0
_UPPER = _USED & ((_NUMBERS[:, None] > 0) | ((_NUMBERS[:, None] == 0) & (_NUMBERS > 0)))  # the other half is conjugate
_RESPONSE = (np.hypot(_NUMBERS[:, None], _NUMBERS) / TILE / MIDDLE) ** WHITE  # of the whitening to a wave


# --- the transforms ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _cosines(size: int) -> Array:
    """The lower rows of the orthonormal cosine transform (DCT-II) [CUT * 2 * size, size]."""
    matrix = np.cos(np.pi * np.outer(np.arange(math.ceil(2 * CUT * size)), np.arange(size) + 0.5) / size)
    matrix *= math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=256)
def _whitening(height: int, width: int) -> Array:
    """The factor of each cosine; 1 at MIDDLE."""
    rows, columns = (np.arange(len(_cosines(size))) / (2 * size) for size in (height, width))
    return ((np.hypot(rows[:, None], columns) / MIDDLE) ** WHITE).astype(np.float32)


def _whiten(y: Array) -> Array:
    down, right = _cosines(y.shape[-2]), _cosines(y.shape[-1])
    return down.T @ (((down @ y) @ right.T) * _whitening(*y.shape[-2:])) @ right


@functools.lru_cache(maxsize=256)
def _averaging(size: int) -> Array:
    """Means over the 2 NEAR + 1 nearest pixels of a row, fewer at its ends, as a matrix [size, size]."""
    steps = np.arange(size)
    near = (np.abs(steps[:, None] - steps) <= NEAR).astype(np.float32)
    return near / near.sum(1, keepdims=True)


def _deviation(white: Array) -> Array:
    height, width = white.shape[-2:]
    deviation: Array = np.sqrt(_averaging(height) @ (white * white) @ _averaging(width).T + FLOOR**2)
    return deviation


@functools.lru_cache(maxsize=256)
def _turns(size: int, scales: tuple[float, ...]) -> Complex:
    """exp(-2 pi i k x / (TILE scale)) [scales * (2K+1), size]."""
    places = np.outer(_NUMBERS, np.arange(size))
    return np.concatenate([np.exp(-2j * np.pi * places / (TILE * scale)) for scale in scales]).astype(np.complex64)


def _waves_in(block: Array, scales: tuple[float, ...] = (1.0,)) -> Complex:
    """Amplitudes of the pattern's waves in whitened blocks [..., h, w]: [..., scales, scales, 2K+1, 2K+1]."""
    height, width = block.shape[-2:]
    waves = _turns(height, scales) @ block.astype(np.complex64) @ _turns(width, scales).T
    count, size = len(scales), 2 * _K + 1
    return waves.reshape(*block.shape[:-2], count, size, count, size).swapaxes(-3, -2) * _USED


def _products(waves: Complex) -> tuple[Complex, Array]:
    """waves [..., 2K+1, 2K+1] times the pattern's conjugate, large ones attenuated, and the norm of each set."""
    size = np.abs(waves)
    products = waves * (_WAVES.conj() / np.sqrt(np.maximum(size, 1e-6)))
    return products, np.sqrt(size.sum((-2, -1)))


# --- marking ----------------------------------------------------------------------------------------------------------


def add_watermark(image: Image.Image) -> Image.Image:
    """An RGB image with the watermark; an image with a side below LEAST is returned unchanged.

    The same image gives the same result. The difference is usually about 1 of 255 grey levels.
    """
    if min(image.size) < LEAST:
        return image
    pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return Image.fromarray(mark_pixels(pixels[None])[0].transpose(1, 2, 0))


def mark_pixels(images: Pixels) -> Pixels:
    """`add_watermark` for uint8 images [N, 3, H, W]; the result for one does not depend on the others.

    Every matrix product is of one image, because BLAS rounds differently for other sizes. It also does so for other
    numbers of threads, so `vultus` gives OpenBLAS one (cli/main.py).
    """
    if min(images.shape[2:]) < LEAST:
        return images
    pixels = images.astype(np.float32)
    y = _brightness(pixels)
    room = _brightness(np.minimum(pixels, 255 - pixels).clip(0, ROOM) / ROOM)  # black and white cannot be changed
    height, width = images.shape[2:]
    places = list(itertools.product(_starts(height, SIDE), _starts(width, SIDE)))
    blocks = [_Blocks(y[:, top : top + SIDE, left : left + SIDE], top, left) for top, left in places]
    pattern = _nearest([block.waves for block in blocks])
    change, weight = np.zeros_like(y), np.zeros_like(y[0])
    for block, (top, left) in zip(blocks, places, strict=True):
        part = np.s_[..., top : top + SIDE, left : left + SIDE]
        change[part] += block.change(pattern, room[part])
        weight[part] += 1
    marked: Pixels = (pixels + _whole_levels(change / weight)[:, None]).clip(0, 255).astype(np.uint8)
    return marked


def _whole_levels(change: Array) -> Array:
    """Changes [N, H, W] rounded to whole grey levels, amplified first where needed to keep the watermark's energy.
    Rounding alone would remove changes below half a level, which images of low contrast have."""
    energy = np.maximum(np.square(change).sum((1, 2)), 1e-12)
    rounded, stretched = np.rint(change), change
    for _ in range(4):
        share = (rounded * change).sum((1, 2)) / energy
        if (share > 0.98).all():
            break
        factor = np.where(share > 0.98, 1, 1 / share.clip(0.5, 1)).astype(np.float32)
        stretched = stretched * factor[:, None, None]
        rounded = np.rint(stretched)
    return rounded


def _brightness(pixels: Array) -> Array:
    """Pixels [N, 3, H, W] -> [N, H, W]."""
    red, green, blue = (pixels[:, channel] * _LUMA[channel] for channel in range(3))
    y: Array = red + green + blue
    return y


def _starts(length: int, step: int) -> list[int]:
    """Start positions of blocks of SIDE that cover `length`, at most `step` apart."""
    count = math.ceil(max(0, length - SIDE) / step) + 1
    return [round(number * max(0, length - SIDE) / max(1, count - 1)) for number in range(count)]


def _nearest(waves: list[Complex]) -> Complex:
    """The shift of the pattern that correlates best with each image: amplitudes [N, 2K+1, 2K+1].

    `waves` are those of its blocks, with phases relative to the image's corner. The detector tests all shifts anyway,
    and unmarked faces have an average score of 3.3 at the best one, which need not be added. (Several patterns of the
    same meaning, of which the nearest is used: the codebook of Costa's dirty paper coding, 1983.)
    """
    sums = np.zeros_like(waves[0])
    for block in waves:
        products, length = _products(block)
        sums += products / np.maximum(length, 1e-6)[:, None, None]
    best = _correlations(sums).reshape(len(sums), -1).argmax(1)
    rows, columns = np.divmod(best[:, None, None], 2 * TILE)
    return _WAVES * _moved(rows / 2, columns / 2).conj()


def _moved(down: Array | int, right: Array | int) -> Complex:
    """Factors [..., 2K+1, 2K+1] of the waves when so many pixels are cropped at the top and on the left."""
    factors: Complex = np.exp(2j * np.pi * (_NUMBERS[:, None] * down + _NUMBERS * right) / TILE).astype(np.complex64)
    return factors


class _Blocks:
    """The block [N, h, w] of the brightness of N images whose upper left corner is at (top, left).

    Attributes:
        local: deviation around each pixel of the whitened block [N, h, w].
        waves: of the whitened block divided by `local` [N, 2K+1, 2K+1], with phases relative to the image's corner.
    """

    def __init__(self, y: Array, top: int, left: int) -> None:
        white = _whiten(y)
        self.local = _deviation(white)
        self._turn = _moved(top, left)
        self.waves = _waves_in(white / self.local)[:, 0, 0] * self._turn.conj()

    def change(self, pattern: Complex, room: Array) -> Array:
        """The change of the brightness [N, h, w]; `room` [N, h, w], 0 to 1, attenuates it at each pixel.

        Steepest ascent of the score in the amplitudes of the waves until the score is TARGET. The metric of the ascent
        is the geometric mean of a wave's strength in the image and in the whitened image. Waves of opposite phase are
        turned before waves of the right phase are amplified. Waves of nearly zero amplitude could be turned at no cost,
        but are as easily turned back; `least` bounds their share of the ascent.
        """
        # In rows: the memory order of a selection depends on N, and with it that of sums.
        waves, aim = (np.ascontiguousarray(values[:, _UPPER]) for values in (self.waves, pattern))
        response = _RESPONSE[_UPPER]
        least = LEAST_WAVE**2 * _square(waves).mean(1, keepdims=True)
        step = STEP * np.sqrt(least) / LEAST_WAVE
        gains = room.sum((1, 2))[:, None] * response
        added = np.zeros_like(waves)
        for _ in range(STEPS):
            now = waves + gains * added
            square = _square(now)
            strong = np.sqrt(np.sqrt(np.maximum(square, 1e-12)))  # square roots of the amplitudes
            along = (now * aim.conj()).real
            # Half of the waves represent all, hence the 2.
            low = (along / strong).sum(1) * math.sqrt(2) < TARGET * np.sqrt((strong * strong).sum(1))
            if not low.any():
                break
            size = np.sqrt(square + least)
            root = np.sqrt(size)
            score = (along / root).sum(1, keepdims=True) / size.sum(1, keepdims=True)
            slope = (aim / root - now * (0.5 * along / (size * size * root) + 0.5 * score / size)) * np.sqrt(response)
            length = np.sqrt(_square(slope * gains).mean(1, keepdims=True))
            added += low[:, None] * step * slope / np.maximum(length, 1e-12)
        whole = np.zeros_like(self.waves)
        whole[:, _UPPER] = 2 * added * self._turn[_UPPER]
        height, width = self.local.shape[1:]
        left, right = _turns(height, (1.0,)).conj().T @ whole, _turns(width, (1.0,)).conj()
        change: Array = left.real @ right.real - left.imag @ right.imag
        return change * self.local * room


def _square(values: Complex) -> Array:
    square: Array = values.real**2 + values.imag**2
    return square


# --- detecting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """The result of the detector.

    Attributes:
        score: the largest correlation of any block, in standard deviations.
        p_value: the probability that an unmarked image of this size has at least this score.
        found: whether the p-value is below ALARM.
    """

    score: float
    p_value: float
    found: bool


def detect_watermark(image: Image.Image) -> Detection:
    """Search for the watermark in an RGB image of any size.

    Examined are the whole image, resized to SIDE x SIDE, and blocks of SIDE x SIDE (smaller where the image is) at its
    own size, at most about WINDOWS of them, evenly distributed over a large image.
    """
    grey = Image.fromarray(np.asarray(image.convert("RGB"), np.float32) @ _LUMA)
    width, height = grey.size
    blocks = []
    if min(width, height) >= LEAST:
        step = max(SIDE // 2, math.ceil(math.sqrt(width * height / WINDOWS)))
        y = np.asarray(grey)
        places = itertools.product(_starts(height, step), _starts(width, step))
        blocks = [y[top : top + SIDE, left : left + SIDE] for top, left in places]
    if (width, height) != (SIDE, SIDE):
        blocks.append(np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    best = max(block_score(block) for block in blocks)
    p_value = -math.expm1(len(blocks) * math.log1p(-_tail(best)))
    return Detection(round(best, 3), float(f"{p_value:.3g}"), p_value < ALARM)


def block_score(y: Array) -> float:
    """The score of one block of brightness [h, w], 0 to 255, over all shifts, scales and the mirror image."""
    white = _whiten(y)
    waves = _waves_in(white / _deviation(white), SCALES).reshape(-1, *_WAVES.shape)
    products, length = _products(np.concatenate([waves, waves[..., ::-1]]))
    return float((_correlations(products).max((1, 2)) / np.maximum(length, 1e-6)).max())


def _correlations(products: Complex) -> Array:
    """The correlation of each set of products [N, 2K+1, 2K+1] at all shifts, half a pixel apart: [N, 2 TILE, 2 TILE].

    This is the inverse Fourier transform. For so few frequencies matrix products are faster, and because those at -k
    are conjugate, half of them and the real part of the sum are sufficient.
    """
    down = _turns(2 * TILE, (2.0,)).conj().T
    right = 2 * down[:, _K:].T
    right[0] /= 2
    sums = down @ products[..., _K:]
    correlations: Array = sums.real @ right.real - sums.imag @ right.imag
    return correlations


def _tail(score: float) -> float:
    """The probability that an unmarked block has at least this score (Gumbel)."""
    return min(-math.expm1(-math.exp(-(score - LOCATION) / SPREAD)), 1 - 1e-9)
