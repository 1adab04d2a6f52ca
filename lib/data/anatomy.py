"""Drawing of a simulated frontal chest film and of the radiographic sign of each NIH finding.

Everything is drawn in film widths (0 to 1, x to the image right, y down), the patient's right on the image left, as NIH films are shown; the thorax is placed on the film at the end by one
small rotation, scaling and shift. A film is a sum of attenuations, as in a radiograph: soft tissue, minus the air of the lungs, plus vessels, heart, bones and what a finding adds. A finding
fills air (`fill`, 0 to 1), adds or removes density (`extra`) or thins the vessels (`vessels`), and returns the pixels it occupies.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

RIGHT, LEFT = -1, 1  # the patient's sides, as signs of x about the midline
LUNG_DEPTH = 0.44  # attenuation that a fully aerated lung takes away


@dataclass(frozen=True)
class Anatomy:
    """What one patient brings to every film. Lengths in film widths; `ctr` is heart width over inner thorax width."""

    apex: float
    base: float
    dome_gap: float  # how much lower the left dome is
    dome: float  # height of the domes over the costophrenic angles
    width: float  # inner half width of the thorax
    ctr: float
    knob: float
    spine_bend: float
    rib_gap: float
    rib_drop: float
    rib_density: float
    clavicle: float
    shoulder: float
    habitus: float  # soft tissue outside the ribs
    breast: float  # 0 for none
    vessel_seed: int


def draw_anatomy(rng: np.random.Generator, age: float, sex: str) -> Anatomy:
    """Draw a patient's anatomy; `age` in years unfolds the aorta and widens the heart, `sex` ('M' or 'F') sets size and breast shadows."""
    female = sex == "F"
    return Anatomy(
        apex=rng.uniform(0.09, 0.15),
        base=rng.uniform(0.63, 0.77) - 0.01 * female,
        dome_gap=rng.uniform(0.0, 0.035),
        dome=rng.uniform(0.06, 0.10),
        width=rng.uniform(0.315, 0.39) - 0.012 * female,
        ctr=rng.uniform(0.40, 0.475) + 0.0003 * (age - 45),
        knob=rng.uniform(0.028, 0.04) + 0.00015 * (age - 45),
        spine_bend=rng.normal(0, 0.012),
        rib_gap=rng.uniform(0.058, 0.072),
        rib_drop=rng.uniform(0.07, 0.15),
        rib_density=rng.uniform(0.09, 0.16),
        clavicle=rng.uniform(0.03, 0.10),
        shoulder=rng.uniform(-0.03, 0.05),
        habitus=rng.uniform(0.05, 0.13),
        breast=rng.uniform(0.3, 1.0) if female else 0.0,
        vessel_seed=int(rng.integers(2**31)),
    )


def _film_anatomy(patient: Anatomy, rng: np.random.Generator, view: str, findings: frozenset[str], signs: dict[str, np.random.Generator]) -> Anatomy:
    """The anatomy on one film: breath and projection vary from film to film; two findings are changes of shape."""
    breath = rng.normal(0, 0.022) - (0.045 if view == "AP" else 0.0)
    film = replace(
        patient,
        base=patient.base + breath,
        dome=patient.dome * rng.uniform(0.9, 1.1),
        ctr=patient.ctr * rng.uniform(0.97, 1.03) + (0.035 if view == "AP" else 0.0),
    )
    film = replace(film, ctr=min(film.ctr, 0.53))
    if "Cardiomegaly" in findings:
        film = replace(film, ctr=signs["Cardiomegaly"].uniform(0.62, 0.80))
    if "Emphysema" in findings:
        severity = signs["Emphysema"].uniform(0.5, 1.0)
        film = replace(film, base=film.base + 0.06 + 0.05 * severity, dome=0.025 - 0.015 * severity, width=film.width * (1.02 + 0.03 * severity))
        if "Cardiomegaly" not in findings:
            film = replace(film, ctr=film.ctr * (0.86 - 0.1 * severity))
    return film


def _curve(points: list[tuple[float, float]], closed: bool = False, per_segment: int = 8) -> np.ndarray:
    """Catmull-Rom curve through the points, float64 (n, 2)."""
    p = np.asarray(points, dtype=np.float64)
    ends = (p[-1:], p[:2]) if closed else (2 * p[:1] - p[1:2], 2 * p[-1:] - p[-2:-1])
    p = np.concatenate([ends[0], p, ends[1]])
    t = np.linspace(0, 1, per_segment, endpoint=False)[None, :, None]
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - 3 * c + d - a) * t**3)
    return curve.reshape(-1, 2) if closed else np.concatenate([curve.reshape(-1, 2), p[-2:-1]])


class Scene:
    """The maps of one film, float32 (size, size) unless said otherwise, while it is being drawn."""

    def __init__(self, anatomy: Anatomy, size: int):
        self.anatomy, self.size = anatomy, size
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = centres[None, :] - 0.5, centres[:, None]
        self.lungs = {side: self.polygon(self._lung(side)) for side in (RIGHT, LEFT)}  # bool
        self.lung = self.lungs[RIGHT] | self.lungs[LEFT]
        self.air = self.soft(self.lung, 0.0045)  # the share of a full lung, before any finding
        self.heart = self.polygon(self._heart())  # bool
        self.fill = np.zeros((size, size), np.float32)
        self.extra = np.zeros((size, size), np.float32)
        self.vessels = np.ones((size, size), np.float32)

    # drawing -------------------------------------------------------------------------------------------------------------------------------------------
    def _pixels(self, points: np.ndarray) -> np.ndarray:  # 4 fractional bits, as OpenCV's shift=4 wants
        return np.round(((points + (0.5, 0.0)) * self.size - 0.5) * 16).astype(np.int32)

    def polygon(self, points: np.ndarray) -> np.ndarray:
        """Filled polygon, bool (size, size); x from the midline."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(canvas, [self._pixels(points)], 1, shift=4)
        return canvas.astype(bool)

    def strokes(self, lines: list[np.ndarray], thickness: float, value: float = 1.0, onto: np.ndarray | None = None) -> np.ndarray:
        """Anti-aliased open lines of a thickness in film widths, uint8 (size, size) with `value` as 255; thinner than a pixel is drawn fainter."""
        canvas = np.zeros((self.size, self.size), np.uint8) if onto is None else onto
        pixels = thickness * self.size
        cv2.polylines(canvas, [self._pixels(line) for line in lines], False, int(255 * value * min(1.0, pixels)), max(1, round(pixels)), cv2.LINE_AA, shift=4)
        return canvas

    def blur(self, image: np.ndarray, sigma: float) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), max(sigma * self.size, 0.3))

    def soft(self, mask: np.ndarray, sigma: float) -> np.ndarray:
        """A bool mask with soft edges, float32."""
        return self.blur(mask.astype(np.float32), sigma)

    def noise(self, rng: np.random.Generator, scale: float) -> np.ndarray:
        """Smooth Gaussian noise of about unit variance whose grain is `scale` film widths."""
        grid = rng.standard_normal((round(1 / scale) + 3,) * 2).astype(np.float32)
        return cv2.resize(grid, (self.size, self.size), interpolation=cv2.INTER_CUBIC) * 1.3

    def opacify(self, amount: np.ndarray) -> None:
        """Replace the share `amount` (0 to 1) of the air that is left."""
        self.fill = 1 - (1 - self.fill) * (1 - np.clip(amount, 0, 1))

    # shapes --------------------------------------------------------------------------------------------------------------------------------------------
    def base_of(self, side: int) -> float:
        return self.anatomy.base + (self.anatomy.dome_gap if side == LEFT else 0.0)

    def _lung(self, side: int) -> np.ndarray:
        a, base = self.anatomy, self.base_of(side)
        w, angle, middle = a.width, base + a.dome, (a.apex + base) / 2
        wall = [(0.045, a.apex + 0.07), (0.075, a.apex + 0.012), (0.125, a.apex), (0.19, a.apex + 0.035), (w * 0.78, a.apex + 0.13), (w * 0.93, a.apex + 0.26), (w, middle + 0.09)]
        wall += [(w * 1.01, base + 0.01), (w * 0.99, angle)]
        floor = [(w * 0.99, angle), (w * 0.85, base + 0.38 * a.dome), (w * 0.58, base), (w * 0.33, base + 0.16 * a.dome), (0.07, base + 0.5 * a.dome)]
        inner = [(0.07, base + 0.5 * a.dome), (0.055, middle + 0.05), (0.05, middle - 0.1), (0.045, a.apex + 0.07)]
        return np.concatenate([_curve(wall), _curve(floor), _curve(inner)]) * (side, 1)

    def heart_top(self) -> float:
        """The level of the pulmonary trunk."""
        return self.anatomy.base - 0.12 - 0.9 * self.anatomy.width * self.anatomy.ctr

    def _heart(self) -> np.ndarray:
        a = self.anatomy
        width = 2 * a.width * a.ctr
        r, l, foot, high = 0.34 * width, 0.66 * width, a.base + 0.05, self.heart_top()
        points = [(-0.04, high - 0.05), (-0.052, high + 0.04), (-0.9 * r, foot - 0.19), (-r, foot - 0.11), (-0.82 * r, foot - 0.02), (0.0, foot + 0.02)]
        points += [(0.72 * l, foot + 0.035), (0.97 * l, foot - 0.015), (0.96 * l, foot - 0.09), (0.68 * l, foot - 0.2), (0.066, high + 0.04), (0.04, high - 0.05)]
        return _curve(points, closed=True)

    def hilum(self, side: int) -> tuple[float, float]:
        a = self.anatomy
        return side * 0.085, a.apex + 0.47 * (a.base - a.apex) - (0.012 if side == LEFT else 0.0)

    def place(self, rng: np.random.Generator, side: int, heights: tuple[float, float], across: tuple[float, float], clear: bool = True) -> tuple[float, float]:
        """A point of a lung: `heights` from apex (0) to dome (1), `across` from the heart or mediastinum (0; from the lung's edge unless `clear`) to the wall (1)."""
        a = self.anatomy
        y = a.apex + rng.uniform(*heights) * (self.base_of(side) - a.apex)
        row = min(int(y * self.size), self.size - 1)
        columns = np.flatnonzero(self.lungs[side][row] & ~(self.heart[row] & clear))
        columns = columns if len(columns) else np.flatnonzero(self.lungs[side][row])
        near, far = np.sort(np.abs(self.x[0, columns[[0, -1]]]))
        return side * (near + rng.uniform(*across) * (far - near)), y

    def distance(self, x: float, y: float) -> np.ndarray:
        return np.hypot(self.x - x, self.y - y)


# findings ----------------------------------------------------------------------------------------------------------------------------------------------
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
        lines.append(np.stack([x + rng.normal(0, 0.015) + reach * t, level + reach * (slope + rng.normal(0, 0.1)) * t + rng.normal(0, 0.01) * t**2], axis=1))
    band = s.blur(s.strokes(lines, rng.uniform(0.014, 0.02)), 0.003).astype(np.float32) / 255 * s.lungs[side]
    rise = round(rng.uniform(0.0, 0.04) * s.size)
    pulled = s.lungs[side] & ~np.roll(s.lungs[side], -rise, axis=0) & (s.y > s.anatomy.base - 0.1)
    s.opacify(0.95 * band)
    s.opacify(s.soft(pulled, 0.004))
    s.extra += 0.12 * band
    return (band > 0.3) | pulled


def _cardiomegaly(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The heart is over 55 % of the thorax (drawn in the anatomy); the large left atrium shows through it as a second border, denser than the rest."""
    mask = s.heart & (s.y > s.heart_top())
    width = 2 * s.anatomy.width * s.anatomy.ctr
    atrium = np.hypot((s.x - rng.uniform(-0.02, 0.02)) / (rng.uniform(0.24, 0.29) * width), (s.y - s.heart_top() - 0.13) / 0.095) < 1
    s.extra += rng.uniform(0.12, 0.18) * s.soft(atrium & mask, 0.004) + rng.uniform(0.03, 0.08) * s.soft(mask, 0.004)
    return mask


def _consolidation(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A lobe filled up to its fissure, with air bronchograms."""
    side = _sides(rng, 0)[0]
    a, height = s.anatomy, s.base_of(side) - s.anatomy.apex
    fissure = a.apex + height * rng.uniform(0.42, 0.58) + rng.uniform(-0.25, 0.25) * (np.abs(s.x) - 0.2)
    lobe = (s.x * side > 0) & ((s.y < fissure) if rng.random() < 0.5 else (s.y > fissure) & (s.y < fissure + height * rng.uniform(0.35, 0.7)))
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
        wing = np.exp(-(((s.x - hx - side * 0.05) / rng.uniform(0.10, 0.13)) ** 2) - ((s.y - hy - 0.02) / rng.uniform(0.15, 0.2)) ** 2)
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
        surface = level - rng.uniform(0.06, 0.12) * np.exp(-np.maximum(wall, 0) / 0.045) + 0.02 * np.exp(-(((wall - 0.15) / 0.08) ** 2))
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
    net = np.maximum(np.clip(1 - np.abs(s.noise(rng, 0.036)) / 0.4, 0, 1), 0.7 * np.clip(1 - np.abs(s.noise(rng, 0.024)) / 0.4, 0, 1))
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
    s.extra += 0.10 * s.soft(d < radius, 0.004) - 0.48 * gas + 0.14 * np.exp(-(((d - radius) / 0.009) ** 2))
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
    return s.soft(amount > 0.2, 0.01) > 0.4


def _mass(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A round, slightly lobulated opacity of more than 3 cm."""
    side = _sides(rng, 0)[0]
    x, y = s.place(rng, side, (0.15, 0.85), (0.25, 0.75))
    angle = np.arctan2(s.y - y, s.x - x)
    radius = rng.uniform(0.05, 0.085) * (1 + 0.07 * np.sin(2 * angle + rng.uniform(0, 6.3)) + 0.04 * np.sin(5 * angle + rng.uniform(0, 6.3)))
    inside = (s.distance(x, y) < radius) & s.lungs[side]
    body = s.soft(inside, 0.006)
    s.opacify(body)
    s.extra += 0.10 * body
    return inside


def _nodule(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """One or several small round opacities."""
    mask = np.zeros_like(s.lung)
    for _ in range(rng.integers(2, 7)):
        side = _sides(rng, 0)[0]
        x, y = s.place(rng, side, (0.1, 0.95), (0.12, 0.88))
        mask |= s.distance(x, y) < rng.uniform(0.017, 0.028)
    body = s.soft(mask, 0.003)
    s.opacify(body * s.lung)
    s.extra += 0.15 * body
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
        mask |= s.lungs[side] & outer & (depth < taper * (rng.uniform(0.026, 0.042) + 0.010 * lumps))
    band = s.soft(mask, 0.004)
    s.opacify(band * 1.5)
    s.extra += 0.22 * band
    return mask


def _pneumonia(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """A segment, wedge-shaped from the hilum to the wall, of confluent cotton-wool shadows."""
    side = _sides(rng, 0)[0]
    hx, hy = s.hilum(side)
    direction = rng.choice([-0.75, 0.1, 0.75]) + rng.normal(0, 0.12)
    angle = np.arctan2(s.y - hy, side * (s.x - hx))
    wedge = s.soft((np.abs(angle - direction) < rng.uniform(0.32, 0.45)) & (s.distance(hx, hy) > 0.05) & s.lungs[side], 0.012) * s.lungs[side]
    wool = np.clip(0.6 + 0.45 * s.noise(rng, 0.022), 0.1, 1)
    s.opacify(wedge * wool)
    return wedge > 0.4


def _pneumothorax(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Air without vessels over the apex and along the wall, outside the line of the collapsed lung."""
    side = _sides(rng, 0)[0]
    lung, shrink = s.lungs[side], rng.uniform(0.5, 0.8)
    cx, cy = (0.5 + side * 0.06) * s.size, (s.base_of(side) + 0.04) * s.size
    matrix = np.array([[shrink, 0, (1 - shrink) * cx], [0, shrink, (1 - shrink) * cy]])
    collapsed = (cv2.warpAffine(lung.astype(np.uint8), matrix, (s.size, s.size)) > 0) & lung
    air = lung & ~collapsed
    edge = s.soft(collapsed, 0.006)
    line = 4 * edge * (1 - edge) * s.soft(lung, 0.004)
    s.vessels *= 1 - s.soft(air, 0.003)
    s.extra += 0.24 * line - 0.15 * s.soft(air, 0.004)
    s.opacify((0.45 + 0.5 * (0.8 - shrink)) * edge * s.soft(lung, 0.004))
    return air | (line > 0.3)


SIGNS = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Effusion": _effusion,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Hernia": _hernia,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pleural_Thickening": _pleural_thickening,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
}


# the normal film ---------------------------------------------------------------------------------------------------------------------------------------
def _body(s: Scene) -> np.ndarray:
    """Soft tissue, 0 outside the patient, thicker away from the skin."""
    a = s.anatomy
    side = a.width + a.habitus
    top = a.shoulder
    shoulder = [(0.12, -0.3), (0.115, 0.0), (0.14, 0.04 + top), (0.27, 0.08 + top), (0.40, 0.12 + top), (0.5, 0.20 + top), (0.58, 0.42), (0.60, 0.6)]
    flank = [(side + 0.07, 0.44), (side, 0.58), (side - 0.01, 0.78), (side + 0.02, 1.3)]
    right = np.concatenate([_curve(shoulder), _curve(flank)])
    mask = s.polygon(np.concatenate([right, right[::-1] * (-1, 1)]))
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1, mode="edge"), cv2.DIST_L2, 3)[1:-1, 1:-1] / s.size
    return mask * (1 - np.exp(depth / -0.05)) * (0.86 + 0.14 * np.exp(-((s.x / 0.3) ** 2)))


def _bones(s: Scene) -> np.ndarray:
    a = s.anatomy
    posterior, anterior, edges = [], [], []
    t = np.linspace(0, 1, 14)
    for k in range(10):
        root = a.apex - 0.012 + k * a.rib_gap
        wall = a.width * min(1.03, 0.52 + 0.17 * k)
        drop = a.rib_drop * min(1.0, 0.35 + 0.2 * k)
        for side in (RIGHT, LEFT):
            x = 0.025 + t * (wall - 0.025)
            y = root - 0.025 * np.sin(np.pi * t) + drop * t**2.2
            posterior.append(np.stack([side * x, y], axis=1))
            edges += [posterior[-1] + (0, offset) for offset in (-0.0095, 0.0095)]
            if k < 7:
                anterior.append(np.stack([side * (wall - (wall - 0.13) * t), y[-1] + 0.02 * np.sin(np.pi * t) + 0.11 * t**1.3], axis=1))
    ribs = s.strokes(edges, 0.004, 1.0, s.strokes(posterior, 0.018, 0.6)).astype(np.float32)
    front = s.strokes(anterior, 0.022).astype(np.float32)
    clavicles = []
    for side in (RIGHT, LEFT):
        y = a.apex + 0.075 + a.clavicle * np.array([0.35, 0.2, 0.0, -0.5, -0.9])
        clavicles.append(_curve([(side * u, v) for u, v in zip((0.03, 0.09, 0.16, 0.25, 0.34), y)]))
    collar = s.strokes([c + (0, o) for c in clavicles for o in (-0.009, 0.009)], 0.005, 1.0, s.strokes(clavicles, 0.02, 0.7)).astype(np.float32)
    blade = [_curve([(side * (a.width * 0.80), a.apex + 0.08), (side * (a.width * 0.93), 0.3), (side * (a.width + 0.015), 0.42), (side * (a.width + 0.09), 0.25)]) for side in (RIGHT, LEFT)]
    scapulae = s.strokes(blade, 0.008).astype(np.float32)
    return s.blur(a.rib_density * (ribs + 0.4 * front) + 0.15 * collar + 0.07 * scapulae, 0.0022) / 255


def _spine(s: Scene) -> np.ndarray:
    centre = np.abs(s.x - (s.anatomy.spine_bend * np.sin(np.pi * 1.3 * s.y)))
    column = 1 / (1 + np.exp(np.clip((centre - 0.04) / 0.006, -20, 20)))
    discs = np.sin(2 * np.pi * s.y / (0.045 + 0.02 * s.y))
    pedicles = np.exp(-(((centre - 0.025) / 0.007) ** 2)) * (discs > 0.3)
    trachea = np.exp(-(np.square(np.square(centre / 0.02)))) * np.clip((0.38 - s.y) / 0.05, 0, 1)
    return column * (0.055 + 0.015 * discs) + 0.03 * pedicles - 0.10 * trachea


def _vascular(s: Scene) -> np.ndarray:
    """Vessels that taper and fork from the hila, with the hilar shadows; the tree is the patient's."""
    rng = np.random.default_rng(s.anatomy.vessel_seed)
    n, forks, steps = 8, 6, 10
    sides = np.repeat([RIGHT, LEFT], n)[:, None]
    root = np.array([s.hilum(side) for side in sides[:, 0]])[:, None]
    t = np.linspace(0, 1, steps)

    def walk(start: np.ndarray, angle: np.ndarray, reach: np.ndarray, bend: float) -> tuple[np.ndarray, np.ndarray]:
        theta = angle[:, None] + rng.normal(0, bend, (len(angle), 1)) * t + 0.25 * bend * rng.standard_normal((len(angle), steps)).cumsum(axis=1)
        step = np.stack([np.repeat(sides, len(angle) // len(sides), axis=0) * np.cos(theta), np.sin(theta)], axis=2)
        return start + np.cumsum(step, axis=1) * reach[:, None, None] / steps, theta

    angle = np.tile(np.linspace(-1.3, 1.4, n), 2) + rng.normal(0, 0.12, 2 * n)
    reach = (0.21 + 0.07 * np.abs(np.sin(angle))) * rng.uniform(0.8, 1.15, 2 * n)
    main, theta = walk(root + rng.normal(0, 0.012, (2 * n, 1, 2)), angle, reach, 0.35)
    at = np.tile(np.arange(1, forks + 1), 2 * n)
    parent = np.repeat(np.arange(2 * n), forks)
    fork = theta[parent, at] + rng.choice([-1, 1], len(at)) * rng.uniform(0.4, 0.9, len(at))
    twig, _ = walk(main[parent, at][:, None], fork, reach[parent] * rng.uniform(0.3, 0.6, len(at)), 0.5)
    tree = np.zeros((s.size, s.size), np.uint8)
    s.strokes([*twig[:, 4:], *main[:, 6:]], 0.004, 0.5, tree)
    s.strokes([*twig[:, :5], *main[:, 3:7]], 0.006, 0.7, tree)
    s.strokes(list(main[:, :4]), 0.010, 0.9, tree)
    hila = sum(np.exp(-(((s.x - x) / 0.03) ** 2)) * np.exp(-(((s.y - y) / 0.06) ** 2)) for x, y in root[[0, -1], 0].tolist())
    return s.blur(tree, 0.0022).astype(np.float32) / 255 + 0.8 * hila


def _compose(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The sum of attenuations, about 0 (open air) to 1.1 (abdomen)."""
    a, air = s.anatomy, s.air
    mediastinum = s.polygon(_curve([(-0.05, -0.1), (-0.055, 0.3), (-0.06, 0.6), (0.05, 0.6), (0.055, 0.3), (0.05, -0.1)], closed=True))
    arch = np.hypot(s.x - 0.045, (s.y - a.apex - 0.36 * (a.base - a.apex) + 0.03) / 1.25) < a.knob
    centre = s.soft(s.heart | mediastinum | arch, 0.007)
    body = _body(s)
    belly = np.clip((s.y - a.base + 0.02) / 0.05, 0, 1) * (1 - air) * body
    aerated = air * (1 - s.fill)
    # What makes raw pixels a poor guide, as in a hospital: depth of the lungs, a patient turned a little to one side, uneven soft tissue.
    depth = LUNG_DEPTH * rng.uniform(0.82, 1.1) * (1 + np.clip(rng.normal(0, 0.13), -0.3, 0.3) * np.sign(s.x))
    density = 0.68 * body + 0.20 * belly + centre * (0.22 + 0.75 * depth * aerated) - depth * aerated
    density += body * (0.055 * s.noise(rng, 0.25) + rng.normal(0, 0.08) * s.x / 0.4 + rng.normal(0, 0.08) * (s.y - 0.5) / 0.4)
    if rng.random() < 0.75:  # the gastric bubble, over a fluid level
        x, y, radius = rng.uniform(0.1, 0.2), s.base_of(LEFT) + rng.uniform(0.05, 0.075), rng.uniform(0.03, 0.055)
        gas = s.soft((np.hypot((s.x - x) / 1.5, s.y - y) < radius) & (s.y < y + 0.4 * radius), 0.006)
        density -= rng.uniform(0.15, 0.35) * gas * (1 - air)
    for side in (RIGHT, LEFT) if a.breast else ():
        r2 = ((s.x - side * a.width * 0.62) / (0.15 + 0.04 * a.breast)) ** 2 + ((s.y - a.base + 0.05) / (0.11 + 0.05 * a.breast)) ** 2
        density += (0.05 + 0.07 * a.breast) * np.sqrt(np.clip(1 - r2, 0, 1))
    density += (_bones(s) + _spine(s)) * np.minimum(2 * body, 1)
    density += 0.20 * _vascular(s) * s.vessels * air * (1 - 0.7 * s.fill) * (1 - 0.5 * centre)
    return (density + s.extra).astype(np.float32)


def _expose(density: np.ndarray, masks: dict[str, np.ndarray], rng: np.random.Generator, view: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Place the thorax on the film and expose it: uint8 film and the masks moved with it."""
    size = len(density)
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), np.clip(rng.normal(0, 4.5), -9, 9), rng.uniform(0.8, 1.1))
    matrix[:, 2] += np.clip(rng.normal(0, 0.05, 2), -0.08, 0.08) * size
    density = cv2.warpAffine(density, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    masks = {name: cv2.warpAffine(mask.astype(np.uint8), matrix, (size, size), flags=cv2.INTER_NEAREST).astype(bool) for name, mask in masks.items()}
    low, high, gamma = rng.uniform(-0.10, 0.06), rng.uniform(0.98, 1.24), rng.uniform(0.65, 1.35)
    film = np.clip((density - low) / (high - low), 0, 1.05) ** gamma * rng.uniform(215, 245)
    film *= 1 + rng.normal(0, 0.05) * np.linspace(-1, 1, size, dtype=np.float32)[None, :]
    film += rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(1.5, 4.0) * (1.4 if view == "AP" else 1.0)
    film = np.clip(film, 0, 255).astype(np.uint8)
    for edge in np.flatnonzero(rng.random(4) < 0.08):
        np.rot90(film, edge)[: rng.integers(1, max(2, size // 25))] = rng.choice([0, 250])
    if rng.random() < 0.8:
        letter, x = ("L", rng.uniform(0.88, 0.95)) if rng.random() < 0.75 else ("R", 0.04)
        at = int(size * x), int(size * rng.uniform(0.05, 0.14))
        cv2.putText(film, letter, at, cv2.FONT_HERSHEY_SIMPLEX, size / 600, 250, max(1, size // 160), cv2.LINE_AA)
    return film, masks


def render_film(patient: Anatomy, *, view: str, findings: frozenset[str], size: int, key: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw one film.

    Parameters
    ----------
    patient : Anatomy
    view : 'PA' or 'AP' (a wider heart, less breath)
    findings : names of `SIGNS`
    size : film side in pixels
    key : integers that seed this film; every finding draws from its own stream, so adding one leaves the rest of the film as it was

    Returns
    -------
    film : uint8 (size, size)
    masks : dict of finding to bool (size, size), the pixels it occupies on this film
    """
    streams = {name: np.random.default_rng((*key, 2 + index)) for index, name in enumerate(SIGNS)}
    scene = Scene(_film_anatomy(patient, np.random.default_rng((*key, 0)), view, findings, streams), size)
    masks = {name: SIGNS[name](scene, streams[name]) for name in SIGNS if name in findings}
    rng = np.random.default_rng((*key, 1))
    return _expose(_compose(scene, rng), masks, rng, view)
