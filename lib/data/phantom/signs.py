"""The radiographic sign of each of the 14 NIH findings, drawn on a `Scene`; a sign returns the pixels it occupies, bool
(size, size).

Lengths are film widths: a thorax of 30 cm is about 0.7.
"""

from functools import partial

import cv2
import numpy as np

from lib.data.phantom.anatomy import LEFT, RIGHT, Anatomy, Scene, compose, expose, film_anatomy
from lib.data.release import FINDINGS


def _sides(rng: np.random.Generator, both: float) -> tuple[int, ...]:
    return (RIGHT, LEFT) if rng.random() < both else (int(rng.choice([RIGHT, LEFT])),)


def _atelectasis(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Plate-like bands over a dome that is pulled up."""
    side = _sides(rng, 0)[0]
    lines, (x, y) = [], s.place(rng, side, (0.6, 0.88), (0.35, 0.6))
    slope, reach = rng.normal(0, 0.3), rng.uniform(0.07, 0.12)
    t = np.linspace(-1, 1, 9)
    for k in range(rng.integers(2, 5)):
        level = y - k * rng.uniform(0.04, 0.055)
        across = x + rng.normal(0, 0.015) + reach * t
        down = level + reach * (slope + rng.normal(0, 0.1)) * t + rng.normal(0, 0.01) * t**2
        lines.append(np.stack([across, down], axis=1))
    band = s.blur(s.strokes(lines, rng.uniform(0.014, 0.02)), 0.003).astype(np.float32) / 255 * s.lungs[side]
    rise = round(rng.uniform(0.0, 0.04) * s.size)
    pulled = s.lungs[side] & ~np.roll(s.lungs[side], -rise, axis=0) & (s.y > s.anatomy.base - 0.1)
    s.opacify(0.95 * band)
    s.opacify(s.soft(pulled, 0.004))
    s.extra += 0.12 * band
    return (band > 0.3) | pulled


def _cardiomegaly(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The heart is over 55 % of the thorax (drawn in the anatomy); the large left atrium shows through it, denser than
    the rest."""
    mask = s.heart & (s.y > s.heart_top())
    width = 2 * s.anatomy.width * s.anatomy.ctr
    across = (s.x - rng.uniform(-0.02, 0.02)) / (rng.uniform(0.24, 0.29) * width)
    atrium = np.hypot(across, (s.y - s.heart_top() - 0.13) / 0.095) < 1
    s.extra += rng.uniform(0.16, 0.22) * s.soft(atrium & mask, 0.004) + rng.uniform(0.03, 0.08) * s.soft(mask, 0.004)
    return mask


def _consolidation(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A lobe filled up to its fissure, with air bronchograms."""
    side = _sides(rng, 0)[0]
    a, height = s.anatomy, s.base_of(side) - s.anatomy.apex
    fissure = a.apex + height * rng.uniform(0.42, 0.58) + rng.uniform(-0.25, 0.25) * (np.abs(s.x) - 0.2)
    if rng.random() < 0.5:
        lobe = (s.x * side > 0) & (s.y < fissure)
    else:
        lobe = (s.x * side > 0) & (s.y > fissure) & (s.y < fissure + height * rng.uniform(0.35, 0.7))
    mask = lobe & s.lungs[side]
    hx, hy = s.hilum(side)
    middle = (mask * s.y).sum() / max(mask.sum(), 1)
    lines = []
    for angle in np.arctan2(middle - hy, 0.14) + np.linspace(-0.75, 0.75, 5) + rng.normal(0, 0.1, 5):
        t = np.linspace(0.02, rng.uniform(0.13, 0.24), 6)
        theta = angle + rng.normal(0, 2.0) * t
        lines.append(np.stack([hx + side * t * np.cos(theta), hy + t * np.sin(theta)], axis=1))
        fork = angle + rng.choice([-1, 1]) * 0.5
        lines.append(lines[-1][2] + t[:4, None] * 0.7 * np.array([side * np.cos(fork), np.sin(fork)]))
    bronchi = s.blur(s.strokes(lines, 0.014), 0.004).astype(np.float32) / 255
    s.opacify(s.soft(lobe, 0.005) * rng.uniform(0.9, 1.0) * (1 - 0.9 * bronchi) * (1 + 0.06 * s.noise(rng, 0.05)))
    s.vessels *= 1 - s.soft(lobe, 0.005)
    s.extra += 0.08 * s.soft(mask, 0.005) * (1 - bronchi)
    return mask


def _edema(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Perihilar haze on both sides, thick upper vessels and Kerley lines."""
    haze = np.zeros_like(s.fill)
    lines = []
    for side in (RIGHT, LEFT):
        hx, hy = s.hilum(side)
        across = (s.x - hx - side * 0.05) / rng.uniform(0.10, 0.13)
        wing = np.exp(-(across**2) - ((s.y - hy - 0.02) / rng.uniform(0.15, 0.2)) ** 2)
        haze = np.maximum(haze, wing * s.lungs[side])
        for _ in range(7):
            x, y = s.place(rng, side, (0.55, 0.98), (0.85, 1.0))
            lines.append(np.array([[x, y], [x - side * rng.uniform(0.03, 0.05), y + rng.normal(0, 0.003)]]))
    kerley = s.strokes(lines, 0.005).astype(np.float32) / 255 * s.lung
    s.opacify(rng.uniform(0.7, 0.95) * haze * (1 + 0.15 * s.noise(rng, 0.03)))
    s.extra += 0.12 * kerley
    s.vessels *= 1 + 1.2 * s.soft(haze > 0.1, 0.02)
    return (haze > 0.25) | (kerley > 0.3)


def _effusion(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The costophrenic angle is lost under a dense base whose upper border climbs the wall (meniscus)."""
    fluid = np.zeros_like(s.lung)
    for side in _sides(rng, 0.25):
        level = s.base_of(side) - rng.uniform(0.01, 0.2)
        wall = s.anatomy.width - s.x * side
        climb = rng.uniform(0.06, 0.12) * np.exp(-np.maximum(wall, 0) / 0.045)
        surface = level - climb + 0.02 * np.exp(-(((wall - 0.15) / 0.08) ** 2))
        fluid |= (s.x * side > 0) & (s.y > surface)
    dense = s.soft(fluid, 0.006)
    s.opacify(dense)
    s.extra += 0.20 * dense * s.air
    return fluid & s.lung


def _emphysema(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Long, dark, poorly vascular lungs over flat domes (drawn in the anatomy), with thin-walled bullae."""
    s.vessels *= 1 - 0.8 * s.lung
    s.extra -= 0.11 * s.soft(s.lung, 0.01)
    for _ in range(rng.integers(5, 10)):
        side = _sides(rng, 0)[0]
        d, radius = s.distance(*s.place(rng, side, (0.08, 0.9), (0.3, 0.9))), rng.uniform(0.035, 0.065)
        inside = s.lungs[side]
        s.extra += inside * (0.20 * np.exp(-(((d - radius) / 0.006) ** 2)) - 0.07 * (d < radius))
    return s.lung.copy()


def _fibrosis(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Coarse reticular lines and honeycombing at both bases and along the wall."""
    a, mask = s.anatomy, np.zeros_like(s.lung)
    coarse, fine = (np.clip(1 - np.abs(s.noise(rng, grain)) / 0.4, 0, 1) for grain in (0.036, 0.024))
    net = np.maximum(coarse, 0.7 * fine)
    reach = rng.uniform(0.5, 0.75)
    for side in (RIGHT, LEFT):
        down = (s.y - a.apex) / (s.base_of(side) - a.apex)
        weight = np.clip((down + 0.35 * np.abs(s.x) / a.width - reach) / 0.2, 0, 1) * s.lungs[side]
        s.extra += 0.40 * net * weight * (1 - 0.6 * s.heart)
        s.opacify(0.2 * weight)
        mask |= weight > 0.3
    return mask


def _hernia(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A round stomach behind the heart: a wall, air above a fluid level."""
    radius = rng.uniform(0.085, 0.12)
    x, y = rng.uniform(-0.06, 0.10), s.anatomy.base + 0.02 - radius * rng.uniform(0.5, 1.0)
    d = np.hypot((s.x - x) / rng.uniform(0.95, 1.2), s.y - y)
    gas = s.soft((d < radius) & (s.y < y + radius * rng.uniform(-0.2, 0.4)), 0.004)
    s.opacify(s.soft(d < radius, 0.004))
    s.extra += 0.10 * s.soft(d < radius, 0.004) - 0.48 * gas + 0.20 * np.exp(-(((d - radius) / 0.010) ** 2))
    return d < radius + 0.008


def _infiltration(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Patchy, ill-defined shadows over a region of one or both lungs."""
    amount = np.zeros_like(s.fill)
    patches = 0.7 * s.noise(rng, 0.045) + 0.35 * s.noise(rng, 0.02)
    for side in _sides(rng, 0.35):
        x, y = s.place(rng, side, (0.2, 0.9), (0.3, 0.75))
        window = np.exp(-(((s.x - x) / rng.uniform(0.09, 0.13)) ** 2) - ((s.y - y) / rng.uniform(0.11, 0.17)) ** 2)
        amount = np.maximum(amount, s.lungs[side] * np.minimum(1.3 * window, 1) * np.clip(0.5 + 0.6 * patches, 0, 1))
    s.opacify(0.95 * amount)
    s.extra += 0.08 * amount
    return s.soft(amount > 0.2, 0.01) > 0.4


def _mass(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A round, slightly lobulated opacity of more than 3 cm."""
    side = _sides(rng, 0)[0]
    x, y = s.place(rng, side, (0.15, 0.85), (0.25, 0.75))
    angle = np.arctan2(s.y - y, s.x - x)
    radius = rng.uniform(0.05, 0.085)
    lobes = 1 + 0.07 * np.sin(2 * angle + rng.uniform(0, 6.3)) + 0.04 * np.sin(5 * angle + rng.uniform(0, 6.3))
    inside = (s.distance(x, y) < radius * lobes) & s.lungs[side]
    body = s.soft(inside, 0.006)
    s.opacify(body)
    s.extra += 0.16 * body
    return inside


def _nodule(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """One or several small round opacities."""
    mask = np.zeros_like(s.lung)
    for _ in range(rng.integers(2, 7)):
        side = _sides(rng, 0)[0]
        x, y = s.place(rng, side, (0.1, 0.95), (0.12, 0.88))
        mask |= s.distance(x, y) < rng.uniform(0.018, 0.029)
    body = s.soft(mask, 0.003)
    s.opacify(body * s.lung)
    s.extra += 0.20 * body
    return mask


def _pleural_thickening(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A dense, lumpy band along the wall and over the apex."""
    mask = np.zeros_like(s.lung)
    lumps = s.noise(rng, 0.045)
    for side in _sides(rng, 0.3):
        a = s.anatomy
        depth = cv2.distanceTransform(s.lungs[side].astype(np.uint8), cv2.DIST_L2, 3) / s.size
        height = (s.y - a.apex) / (s.base_of(side) - a.apex)
        start = rng.uniform(-0.1, 0.25)
        end = start + rng.uniform(0.5, 0.75)
        taper = np.clip(np.minimum(height - start, end - height) / 0.12, 0, 1)
        outer = np.abs(s.x) > 0.10 + 0.25 * np.clip(height, 0, 0.4)
        mask |= s.lungs[side] & outer & (depth < taper * (rng.uniform(0.032, 0.050) + 0.010 * lumps))
    band = s.soft(mask, 0.004)
    s.opacify(band * 1.5)
    s.extra += 0.28 * band
    return mask


def _pneumonia(s: Scene, rng: np.random.Generator, foci: int = 1) -> np.ndarray:
    """A segment of confluent cotton-wool shadows, or `foci` of them on alternate sides."""
    side = _sides(rng, 0)[0]
    mask = np.zeros_like(s.lung)
    for focus in range(foci):
        mask |= _segment(s, rng, -side if focus % 2 else side)
    return mask


def _segment(s: Scene, rng: np.random.Generator, side: int) -> np.ndarray:
    """Wedge-shaped from the hilum to the wall."""
    hx, hy = s.hilum(side)
    direction = rng.choice([-0.75, 0.1, 0.75]) + rng.normal(0, 0.12)
    angle = np.arctan2(s.y - hy, side * (s.x - hx))
    inside = (np.abs(angle - direction) < rng.uniform(0.32, 0.45)) & (s.distance(hx, hy) > 0.05) & s.lungs[side]
    wedge = s.soft(inside, 0.012) * s.lungs[side]
    wool = np.clip(0.6 + 0.45 * s.noise(rng, 0.022), 0.1, 1)
    s.opacify(wedge * wool)
    s.extra += 0.12 * wedge * wool
    return wedge > 0.4


def _pneumothorax(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Air without vessels over the apex and along the wall, outside the line of the collapsed lung."""
    side = _sides(rng, 0)[0]
    lung, shrink = s.lungs[side], rng.uniform(0.5, 0.75)
    cx, cy = (0.5 + side * 0.06) * s.size, (s.base_of(side) + 0.04) * s.size
    matrix = np.array([[shrink, 0, (1 - shrink) * cx], [0, shrink, (1 - shrink) * cy]])
    collapsed = (cv2.warpAffine(lung.astype(np.uint8), matrix, (s.size, s.size)) > 0) & lung
    air = lung & ~collapsed
    edge = s.soft(collapsed, 0.006)
    line = 4 * edge * s.soft(air, 0.006)
    s.vessels *= 1 - s.soft(air, 0.003)
    s.extra += 0.30 * line - 0.17 * s.soft(air, 0.004)
    s.opacify(rng.uniform(0.05, 0.18) * edge * s.soft(lung, 0.004))
    return air | (line > 0.3)


# In the order of FINDINGS: a film's random numbers hang on it.
_DRAW = (
    _atelectasis, _cardiomegaly, _consolidation, _edema, _effusion, _emphysema, _fibrosis, _hernia, _infiltration,
    _mass, _nodule, _pleural_thickening, _pneumonia, _pneumothorax,
)  # fmt: skip
SIGNS = dict(zip(FINDINGS, _DRAW, strict=True))


def render_film(
    patient: Anatomy, *, view: str, findings: frozenset[str], size: int, key: tuple[int, ...], foci: int = 1
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Draw one film.

    Parameters
    ----------
    patient : Anatomy
    view : 'PA' or 'AP' (a wider heart, less breath)
    findings : names of `SIGNS`
    size : film side in pixels
    key : integers that seed this film; every finding draws from its own stream, so adding one leaves the rest of the
    film as it was
    foci : number of segments that Pneumonia takes

    Returns
    -------
    film : uint8 (size, size)
    masks : dict of finding to bool (size, size), the pixels it occupies on this film
    lungs : bool (size, size), the two lung fields on this film, also where heart or findings lie over them
    """
    signs = SIGNS | {"Pneumonia": partial(_pneumonia, foci=foci)}
    streams = {name: np.random.default_rng((*key, 2 + index)) for index, name in enumerate(SIGNS)}
    scene = Scene(film_anatomy(patient, np.random.default_rng((*key, 0)), view, findings, streams), size)
    masks = {name: signs[name](scene, streams[name]) for name in SIGNS if name in findings}
    rng = np.random.default_rng((*key, 1))
    film, masks = expose(compose(scene, rng), masks | {"lungs": scene.lung}, rng, view)
    lungs = masks.pop("lungs")
    return film, masks, lungs
