"""Radar images: the power of every cell in decibels, over range and Doppler."""

import numpy as np
import plotly.graph_objects as go

from workbench.errors import InputError
from workbench.figures.theme import blank, colour_bar, sequential


def range_doppler_map(
    power: np.ndarray,
    *,
    title: str,
    subtitle: str = "",
    doppler_hz: float = 1.0,
    floor_db: float = -80.0,
    columns: int | None = None,
    theme: str = "light",
) -> go.Figure:
    """A heat map of 10 log10 of the powers of an image, (M, N) with Doppler 0 in row 0, which is drawn in the middle.

    Args:
        doppler_hz: from one row to the next.
        floor_db: what lies below has the colour of it; the colours end at 0 dB or above at the highest power.
        columns: so many of the first; all where none is named.

    Raises:
        InputError: no matrix, or a power that is negative or no finite number.
    """
    power = np.asarray(power, dtype=float)
    if power.ndim != 2 or not power.size or not np.isfinite(power).all() or (power < 0).any():
        raise InputError(f"power has shape {power.shape} but must be a matrix of finite numbers, 0 or above")
    shown = np.fft.fftshift(10 * np.log10(np.maximum(power, 1e-30)), axes=0)[:, :columns]
    rows = (np.arange(len(power)) - len(power) // 2) * doppler_hz / 1e3
    figure = blank(theme, title, subtitle, x="range (samples of delay)", y="Doppler (kHz)")
    figure.add_heatmap(
        z=np.maximum(shown, floor_db).astype(np.float32),
        x=np.arange(shown.shape[1]),
        y=rows,
        customdata=shown.astype(np.float32),
        colorscale=sequential(theme),
        zmin=floor_db,
        zmax=max(0.0, float(shown.max())),
        colorbar=colour_bar(unit="dB"),
        hovertemplate="delay %{x}, Doppler %{y:.2f} kHz<br><b>%{customdata:.1f} dB</b><extra></extra>",
    )
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return figure
