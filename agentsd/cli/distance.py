"""Distance between two pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Distance:
    """Distance between two pictures of the same size.

    Attributes:
        rmse: root mean square difference of the RGB values, 0–255.
        ssim: structural similarity (Wang et al., IEEE TIP 2004), −1–1, 1 for equal pictures; None if scikit-image is
            not installed.
    """

    rmse: float
    ssim: float | None

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
        return 20 * math.log10(255 / self.rmse) if self.rmse else math.inf

    def __str__(self) -> str:
        if self.rmse == 0:
            return "no difference"
        return f"PSNR {self.psnr:.1f} dB" + ("" if self.ssim is None else f", SSIM {self.ssim:.3f}")

    def record(self) -> dict[str, float | None]:
        """The figures for JSON and CSV, which have no infinity: equal pictures get no PSNR."""
        psnr = round(self.psnr, 3) if self.rmse else None
        ssim = None if self.ssim is None else round(self.ssim, 5)
        return {"rmse": round(self.rmse, 4), "psnr": psnr, "ssim": ssim}


def distance(a: Image, b: Image) -> Distance:
    """Measure the distance between two RGB pictures.

    Raises:
        ValueError: the pictures differ in size.
    """
    x, y = pixels(a), pixels(b)
    if x.shape != y.shape:
        raise ValueError(f"pictures must have the same size, got {a.size} and {b.size}")
    return Distance(float(np.sqrt(np.mean((x - y) ** 2))), _ssim(x, y))


def pixels(picture: Image) -> np.ndarray:
    """Return the RGB values (height, width, 3) as floats, 0–255."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _ssim(x: np.ndarray, y: np.ndarray) -> float | None:
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    # the paper's constants: Gaussian windows of σ = 1.5, population covariance
    constants = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(x, y, channel_axis=2, data_range=255, **constants))
