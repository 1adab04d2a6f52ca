"""Drawing of a simulated frontal chest film: the patient, the normal film, its exposure. What a finding adds is in
`signs`.

Everything is drawn in film widths (0 to 1, x to the image right from the midline, y down), the patient's right on the
image left, as NIH films are shown; the thorax is placed on the film at the end by one small rotation, scaling and
shift. A film is a sum of attenuations, as in a radiograph: soft tissue, minus the air of the lungs, plus vessels,
heart, bones and what a finding adds. A finding fills air (`fill`, 0 to 1), adds or removes density (`extra`), or thins
the vessels (`vessels`).
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

RIGHT, LEFT = -1, 1  # the patient's sides, as signs of x about the midline
LUNG_DEPTH = 0.48  # attenuation that a fully aerated lung takes away
MARKER_GREY = 250


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
    """Draw a patient's anatomy; `age` in years unfolds the aorta and widens the heart, `sex` ('M' or 'F') sets size and
    breast shadows."""
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


def film_anatomy(
    patient: Anatomy,
    rng: np.random.Generator,
    view: str,
    findings: frozenset[str],
    signs: dict[str, np.random.Generator],
) -> Anatomy:
    """The anatomy on one film: breath and projection vary from film to film; two findings are changes of shape."""
    lying = view == "AP"
    base = patient.base + (rng.normal(0, 0.022) - (0.045 if lying else 0.0))
    dome = patient.dome * rng.uniform(0.9, 1.1)
    ctr = patient.ctr * rng.uniform(0.97, 1.03) + (0.035 if lying else 0.0)
    film = replace(patient, base=base, dome=dome, ctr=min(ctr, 0.53))
    if "Cardiomegaly" in findings:
        film = replace(film, ctr=signs["Cardiomegaly"].uniform(0.64, 0.82))
    if "Emphysema" in findings:
        severity = signs["Emphysema"].uniform(0.5, 1.0)
        base, width = film.base + 0.06 + 0.05 * severity, film.width * (1.02 + 0.03 * severity)
        film = replace(film, base=base, dome=0.025 - 0.015 * severity, width=width)
        if "Cardiomegaly" not in findings:
            film = replace(film, ctr=film.ctr * (0.86 - 0.1 * severity))
    return film


def curve(points: list[tuple[float, float]], closed: bool = False, per_segment: int = 8) -> np.ndarray:
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

    # drawing

    def _pixels(self, points: np.ndarray) -> np.ndarray:
        """Fixed point with 4 fractional bits, as OpenCV's shift=4 wants."""
        return np.round(((points + (0.5, 0.0)) * self.size - 0.5) * 16).astype(np.int32)

    def polygon(self, points: np.ndarray) -> np.ndarray:
        """Filled polygon, bool (size, size); x from the midline."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        cv2.fillPoly(canvas, [self._pixels(points)], 1, shift=4)
        return canvas.astype(bool)

    def strokes(
        self, lines: list[np.ndarray], thickness: float, value: float = 1.0, onto: np.ndarray | None = None
    ) -> np.ndarray:
        """Anti-aliased open lines, uint8 (size, size), `value` 1 as 255; a `thickness` (film widths) under a pixel is
        drawn fainter."""
        canvas = np.zeros((self.size, self.size), np.uint8) if onto is None else onto
        width = thickness * self.size
        points = np.split(self._pixels(np.concatenate(lines)), np.cumsum([len(line) for line in lines[:-1]]))
        grey = int(255 * value * min(1.0, width))
        cv2.polylines(canvas, points, False, grey, max(1, round(width)), cv2.LINE_AA, shift=4)
        return canvas

    def blur(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """An image of any type behind a Gaussian of `sigma` film widths, of the same type."""
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

    # shapes

    def base_of(self, side: int) -> float:
        """The level of a lung's dome, y."""
        return self.anatomy.base + (self.anatomy.dome_gap if side == LEFT else 0.0)

    def _lung(self, side: int) -> np.ndarray:
        a, base = self.anatomy, self.base_of(side)
        w, angle, middle = a.width, base + a.dome, (a.apex + base) / 2
        wall = [
            (0.045, a.apex + 0.07), (0.075, a.apex + 0.012), (0.125, a.apex), (0.19, a.apex + 0.035),
            (w * 0.78, a.apex + 0.13), (w * 0.93, a.apex + 0.26), (w, middle + 0.09), (w * 1.01, base + 0.01),
            (w * 0.99, angle),
        ]  # fmt: skip
        floor = [
            (w * 0.99, angle), (w * 0.85, base + 0.38 * a.dome), (w * 0.58, base), (w * 0.33, base + 0.16 * a.dome),
            (0.07, base + 0.5 * a.dome),
        ]  # fmt: skip
        inner = [(0.07, base + 0.5 * a.dome), (0.055, middle + 0.05), (0.05, middle - 0.1), (0.045, a.apex + 0.07)]
        return np.concatenate([curve(wall), curve(floor), curve(inner)]) * (side, 1)

    def heart_top(self) -> float:
        """The level of the pulmonary trunk."""
        return self.anatomy.base - 0.12 - 0.9 * self.anatomy.width * self.anatomy.ctr

    def _heart(self) -> np.ndarray:
        a = self.anatomy
        width = 2 * a.width * a.ctr
        r, apex, foot, high = 0.34 * width, 0.66 * width, a.base + 0.05, self.heart_top()
        points = [
            (-0.04, high - 0.05), (-0.052, high + 0.04), (-0.9 * r, foot - 0.19), (-r, foot - 0.11),
            (-0.82 * r, foot - 0.02), (0.0, foot + 0.02), (0.72 * apex, foot + 0.035), (0.97 * apex, foot - 0.015),
            (0.96 * apex, foot - 0.09), (0.68 * apex, foot - 0.2), (0.066, high + 0.04), (0.04, high - 0.05),
        ]  # fmt: skip
        return curve(points, closed=True)

    def hilum(self, side: int) -> tuple[float, float]:
        """The root of a lung's vessels, x and y."""
        a = self.anatomy
        return side * 0.085, a.apex + 0.47 * (a.base - a.apex) - (0.012 if side == LEFT else 0.0)

    def place(
        self, rng: np.random.Generator, side: int, heights: tuple[float, float], across: tuple[float, float]
    ) -> tuple[float, float]:
        """A point of a lung, x and y: `heights` from apex (0) to dome (1), `across` from the heart or mediastinum (0)
        to the wall (1)."""
        a = self.anatomy
        y = a.apex + rng.uniform(*heights) * (self.base_of(side) - a.apex)
        row = min(int(y * self.size), self.size - 1)
        columns = np.flatnonzero(self.lungs[side][row] & ~self.heart[row])
        columns = columns if len(columns) else np.flatnonzero(self.lungs[side][row])
        near, far = np.sort(np.abs(self.x[0, columns[[0, -1]]]))
        return float(side * (near + rng.uniform(*across) * (far - near))), y

    def distance(self, x: float, y: float) -> np.ndarray:
        """From the point (x, y), film widths, float32 (size, size)."""
        return np.hypot(self.x - x, self.y - y)


def _body(s: Scene) -> np.ndarray:
    """Soft tissue, 0 outside the patient, thicker away from the skin."""
    a = s.anatomy
    side, top = a.width + a.habitus, a.shoulder
    shoulder = [
        (0.12, -0.3), (0.115, 0.0), (0.14, 0.04 + top), (0.27, 0.08 + top), (0.40, 0.12 + top), (0.5, 0.20 + top),
        (0.58, 0.42), (0.60, 0.6),
    ]  # fmt: skip
    flank = [(side + 0.07, 0.44), (side, 0.58), (side - 0.01, 0.78), (side + 0.02, 1.3)]
    right = np.concatenate([curve(shoulder), curve(flank)])
    mask = s.polygon(np.concatenate([right, right[::-1] * (-1, 1)]))
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1, mode="edge"), cv2.DIST_L2, 3)[1:-1, 1:-1] / s.size
    return mask * (1 - np.exp(depth / -0.05)) * (0.86 + 0.14 * np.exp(-((s.x / 0.3) ** 2)))


def _bones(s: Scene) -> np.ndarray:
    a, sides = s.anatomy, np.array([[RIGHT], [LEFT]])

    def both(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:  # lines (n, points) to the right, then to the left
        return list(np.stack(np.broadcast_arrays(sides[:, None] * x, y), axis=-1).reshape(-1, x.shape[1], 2))

    t, rib = np.linspace(0, 1, 12), np.arange(10)[:, None]
    root = a.apex - 0.012 + rib * a.rib_gap
    wall = a.width * np.minimum(1.03, 0.52 + 0.17 * rib)
    drop = a.rib_drop * np.minimum(1.0, 0.35 + 0.2 * rib)
    x, y = 0.025 + t * (wall - 0.025), root - 0.025 * np.sin(np.pi * t) + drop * t**2.2
    posterior = both(x, y)
    x, y = wall - (wall - 0.13) * t, y[:, -1:] + 0.02 * np.sin(np.pi * t) + 0.11 * t**1.3
    anterior = both(x[:7], y[:7])
    rims = [line + (0, shift) for shift in (-0.0095, 0.0095) for line in posterior]
    ribs = s.strokes(rims, 0.004, 1.0, s.strokes(posterior, 0.018, 0.6)).astype(np.float32)
    front = s.strokes(anterior, 0.022).astype(np.float32)
    level = a.apex + 0.075 + a.clavicle * np.array([0.35, 0.2, 0.0, -0.5, -0.9])
    clavicle = curve(list(zip((0.03, 0.09, 0.16, 0.25, 0.34), level)), per_segment=4)
    clavicles = [clavicle * (side, 1) for side in (RIGHT, LEFT)]
    rims = [line + (0, shift) for line in clavicles for shift in (-0.009, 0.009)]
    collar = s.strokes(rims, 0.005, 1.0, s.strokes(clavicles, 0.02, 0.7)).astype(np.float32)
    w = a.width
    blade = curve([(w * 0.80, a.apex + 0.08), (w * 0.93, 0.3), (w + 0.015, 0.42), (w + 0.09, 0.25)])
    scapulae = s.strokes([blade * (side, 1) for side in (RIGHT, LEFT)], 0.008).astype(np.float32)
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
        theta = angle[:, None] + rng.normal(0, bend, (len(angle), 1)) * t
        theta = theta + 0.25 * bend * rng.standard_normal((len(angle), steps)).cumsum(axis=1)
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
    places = root[[0, -1], 0].tolist()
    hila = sum(np.exp(-(((s.x - x) / 0.03) ** 2)) * np.exp(-(((s.y - y) / 0.06) ** 2)) for x, y in places)
    return s.blur(tree, 0.0022).astype(np.float32) / 255 + 0.8 * hila


def compose(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The sum of attenuations, about 0 (open air) to 1.1 (abdomen)."""
    a, air = s.anatomy, s.air
    outline = [(-0.05, -0.1), (-0.055, 0.3), (-0.06, 0.6), (0.05, 0.6), (0.055, 0.3), (0.05, -0.1)]
    mediastinum = s.polygon(curve(outline, closed=True))
    arch = np.hypot(s.x - 0.045, (s.y - a.apex - 0.36 * (a.base - a.apex) + 0.03) / 1.25) < a.knob
    centre = s.soft(s.heart | mediastinum | arch, 0.007)
    body = _body(s)
    belly = np.clip((s.y - a.base + 0.02) / 0.05, 0, 1) * (1 - air) * body
    aerated = air * (1 - s.fill)
    # What makes raw pixels a poor guide, as in a hospital: depth of the lungs, a patient turned a little to one side,
    # uneven soft tissue.
    depth = LUNG_DEPTH * rng.uniform(0.82, 1.1) * (1 + float(np.clip(rng.normal(0, 0.13), -0.3, 0.3)) * np.sign(s.x))
    density = 0.68 * body + 0.20 * belly + centre * (0.22 + 0.75 * depth * aerated) - depth * aerated
    uneven = 0.04 * s.noise(rng, 0.25) + rng.normal(0, 0.06) * s.x / 0.4 + rng.normal(0, 0.06) * (s.y - 0.5) / 0.4
    density += body * uneven
    if rng.random() < 0.75:  # the gastric bubble, over a fluid level
        x, y, radius = rng.uniform(0.1, 0.2), s.base_of(LEFT) + rng.uniform(0.05, 0.075), rng.uniform(0.03, 0.055)
        gas = s.soft((np.hypot((s.x - x) / 1.5, s.y - y) < radius) & (s.y < y + 0.4 * radius), 0.006)
        density -= rng.uniform(0.15, 0.35) * gas * (1 - air)
    for side in (RIGHT, LEFT) if a.breast else ():
        across = (s.x - side * a.width * 0.62) / (0.15 + 0.04 * a.breast)
        down = (s.y - a.base + 0.05) / (0.11 + 0.05 * a.breast)
        density += (0.05 + 0.07 * a.breast) * np.sqrt(np.clip(1 - (across**2 + down**2), 0, 1))
    density += (_bones(s) + _spine(s)) * np.minimum(2 * body, 1)
    density += rng.uniform(0.14, 0.28) * _vascular(s) * s.vessels * air * (1 - 0.7 * s.fill) * (1 - 0.5 * centre)
    return (density + s.extra).astype(np.float32)


def expose(
    density: np.ndarray, masks: dict[str, np.ndarray], rng: np.random.Generator, view: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Place the thorax on the film and expose it: uint8 film and the masks moved with it."""
    size = len(density)
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), np.clip(rng.normal(0, 4.5), -9, 9), rng.uniform(0.8, 1.1))
    matrix[:, 2] += np.clip(rng.normal(0, 0.05, 2), -0.08, 0.08) * size
    density = cv2.warpAffine(density, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    moved = {}
    for name, mask in masks.items():
        moved[name] = cv2.warpAffine(mask.astype(np.uint8), matrix, (size, size), flags=cv2.INTER_NEAREST).astype(bool)
    low, high, gamma = rng.uniform(-0.08, 0.04), rng.uniform(1.05, 1.24), rng.uniform(0.75, 1.2)
    film = cv2.pow(np.clip((density - low) / (high - low), 0, 1.05), gamma) * rng.uniform(215, 245)
    film *= 1 + rng.normal(0, 0.05) * np.linspace(-1, 1, size, dtype=np.float32)[None, :]
    film += rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(1.5, 4.0) * (1.4 if view == "AP" else 1.0)
    film = np.clip(film, 0, 255).astype(np.uint8)
    for edge in np.flatnonzero(rng.random(4) < 0.08):
        np.rot90(film, edge)[: rng.integers(1, max(2, size // 25))] = rng.choice([0, 250])
    if rng.random() < 0.8:
        letter, x = ("L", rng.uniform(0.88, 0.95)) if rng.random() < 0.75 else ("R", 0.04)
        at = int(size * x), int(size * rng.uniform(0.05, 0.14))
        cv2.putText(film, letter, at, cv2.FONT_HERSHEY_SIMPLEX, size / 600, 250, max(1, size // 160), cv2.LINE_AA)
    return film, moved


def burn_marker(film: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Burn a technician's lead letter into a film, above the patient's right shoulder; its place varies by one percent
    of the film.

    Parameters
    ----------
    film : uint8 (size, size), left as it is
    rng : of the place

    Returns
    -------
    film : uint8 (size, size), the same outside the letter
    mask : bool (size, size), the letter, 10 % of the film high
    """
    size = len(film)
    # Drawn large, 350 of 640 high (the font is 21 high at scale 1), on a tile of 0.18 of the film; then averaged down.
    tile = np.zeros((640, 640), np.uint8)
    cv2.putText(tile, "K", (150, 500), cv2.FONT_HERSHEY_SIMPLEX, 350 / 21, 255, 80, cv2.LINE_AA)
    width = round(0.18 * size)
    weight = cv2.resize(tile, (width, width), interpolation=cv2.INTER_AREA) / 255
    weight[weight < 0.1] = 0
    # As far from the edges as the lungs allow: training crops up to an eighth of a film away.
    left, top = np.round((np.array([0.05, 0.04]) + rng.uniform(-0.01, 0.01, 2)) * size).astype(int)
    place = np.s_[top : top + width, left : left + width]
    film, mask = film.copy(), np.zeros(film.shape, bool)
    film[place] = np.round(film[place] + weight * (MARKER_GREY - film[place].astype(np.float64)))
    mask[place] = weight > 0
    return film, mask
