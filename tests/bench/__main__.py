"""`python -m tests.bench`: the speed of this project against its peers, as ratios of one run. Absolute times belong to
the machine.

Rows of data and models are here, those of the pure analysis functions and of training in the modules beside. `ratio` is
above 1 where ours is better, except in the last row of a backbone, a share of forward-only speed, and in those of
training, a share of the bare loop's. Processor time counts, of training wall time; the best of the repeats, on one
thread.
"""

import time

import cv2
import numpy as np
import pandas as pd
import torch

from lib.analysis.alignment import align
from lib.analysis.cam import class_activation_maps
from lib.analysis.dissection.concepts import dissect
from lib.analysis.inference import stream
from lib.analysis.pairs import box_pairs
from lib.data.batches import Batch, film_draws, gather_crops
from lib.data.decoding import decode_film
from lib.models import build_model, layers
from tests.bench import analysis, features, relevance, training
from tests.bench.timing import best_times, one_thread

CLASSES = [f"class {k}" for k in range(15)]


def result(row, peer, ours, other, note=""):
    """One row of the table; `ours` and `other` are seconds for the same work."""
    return {"row": row, "peer_name": peer, "ours": ours, "peer": other, "ratio": other / ours, "note": note}


def textured_film(side, seed=0):
    """PNG bytes of a film with a radiograph's share of noise, so that it takes as long to decode as a real one."""
    rng = np.random.default_rng(seed)
    film = cv2.resize(
        rng.uniform(40, 220, (16, 16)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC
    ) + rng.normal(0, 4, (side, side))
    return cv2.imencode(".png", film.clip(0, 255).astype(np.uint8))[1].tobytes()


def training_item(repeats=5):
    """One augmented uint8 training film: from the store, and from its 1024 px PNG."""
    png, images, n = (
        textured_film(1024),
        np.random.default_rng(0).integers(0, 256, (512, 256, 256), dtype=np.uint8),
        256,
    )

    def ours():
        rows = np.arange(n)
        draws = film_draws(0, 1, rows, 5)
        top, left = (draws[:, :2] * 33).astype(int).T
        gather_crops(images, rows, top, left, draws[:, 2] < 0.5, 224)

    def peer():
        film = cv2.resize(
            cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE), (256, 256), interpolation=cv2.INTER_AREA
        )
        np.ascontiguousarray(film[10:234, 20:244][:, ::-1])

    own, other = best_times([ours, peer], repeats)
    return result("training item, crop and flip", "decode 1024 px PNG", own / n, other)


def store_build(repeats=5):
    """A film on its way into the store, beside decoding it and nothing else."""
    png = textured_film(1024)
    buffer = np.frombuffer(png, np.uint8)
    functions = [lambda: decode_film(png, 256), lambda: cv2.imdecode(buffer, cv2.IMREAD_GRAYSCALE)]
    own, other = best_times(functions, repeats)
    return result("store build, per film", "decode only", own, other)


def cams(backbone, repeats=2, n_films=4):
    """Maps of all 15 classes of a few films, forward pass included: ours, captum's and pytorch-grad-cam's."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, layer = build_model(backbone, 15).eval(), layers(backbone)[0]
    module = dict(model.named_modules())[layer]
    films = torch.randn(n_films, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    batches = [Batch(np.arange(n_films), films, torch.zeros(n_films, 15))]

    def ours():
        for output in stream(model, batches, [layer]):
            class_activation_maps(output.maps[layer], model.head.weight)

    def captum():
        attribution = LayerGradCam(model, module)
        for k in range(15):
            attribution.attribute(films, target=k)

    def grad_cam():
        with GradCAM(model, [module]) as method:
            for k in range(15):
                method(films, [ClassifierOutputTarget(k)] * n_films)

    rows = []
    for name, peer in (("captum LayerGradCam", captum), ("pytorch-grad-cam", grad_cam)):
        own, other = best_times([ours, peer], repeats)
        rows.append(result(f"CAM of all classes, {backbone}", name, own / (n_films * 15), other / (n_films * 15)))
    return rows


def whole_evaluation(backbone, repeats=2, n_films=24):
    """Logits, alignment and concepts of annotated films from one forward pass, beside the forward pass alone."""
    model, (cam_layer, concept_layer, q) = build_model(backbone, 15).eval(), layers(backbone)
    films = torch.randn(n_films, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    batches = [Batch(np.arange(k, k + 8), films[k : k + 8], torch.zeros(8, 15)) for k in range(0, n_films, 8)]
    table = pd.DataFrame({"image": [str(k) for k in range(n_films)], "patient": range(n_films)})
    corners = np.random.default_rng(0).uniform(0, 140, (n_films, 2))
    boxes = pd.DataFrame(
        {
            "image": table["image"],
            "class": [CLASSES[k % 15] for k in range(n_films)],
            "x1": corners[:, 0],
            "y1": corners[:, 1],
            "x2": corners[:, 0] + 60,
            "y2": corners[:, 1] + 70,
        }
    )
    pairs = box_pairs(table, boxes, CLASSES)
    regions = dict(zip(pairs["row"], pairs["boxes"]))

    def ours():
        aligned = []

        def outputs():
            for output in stream(model, batches, [cam_layer, concept_layer]):
                aligned.append(align([output], pairs, model.head, layer=cam_layer, image_size=224))
                yield output

        dissect(outputs(), regions, layer=concept_layer, q=q, image_size=224)

    def peer():
        with torch.inference_mode():
            for batch in batches:
                model(batch.images)

    own, other = best_times([ours, peer], repeats)
    return result(
        f"evaluation + CAM + overlap + concepts, {backbone}",
        "forward only",
        own / n_films,
        other / n_films,
        "goal 0.90",
    )


def main():
    """Print the table."""
    start = time.perf_counter()
    with one_thread():
        rows = [training_item(), store_build(), *analysis.rows(), *relevance.rows(), *features.rows(), *training.rows()]
        for backbone in ("tdensenet", "resnet50"):
            rows += [*cams(backbone), whole_evaluation(backbone)]
    table = pd.DataFrame(rows)[["row", "peer_name", "ratio"]].rename(columns={"peer_name": "peer"})
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2f}" if value < 10 else f"{value:.0f}"))
    print(
        f"\n{time.perf_counter() - start:.0f} s, one thread, {torch.backends.cpu.get_cpu_capability()}; ratios are "
        "peer time / our time"
    )


if __name__ == "__main__":
    main()
