"""How much a coordinator reconstructs: attacks × protections × batch sizes, on heart disease and chest X-rays.

The coordinator sees one local step of a batch a hospital and round: each hospital's update (``plain``), noised ones
(``dp``), masked vectors and their sum (``secagg``), or these with noise in the sum (``both``). At least 300 samples a
cell, except for the two searches by gradient, which cost hours at that number (their notes say how many).

- *exact*: inputs of the first fully connected layer, told apart, and drawn by a decoder learnt on public images.
- *generative*: search over the latents of a generator learnt on public images, then over pixels.
- *Inverting Gradients*: search over pixels.
- *lying*: the coordinator sends weights made to isolate samples; then as *exact*.

Public: the validation images (heart: nothing). A sample leaks when SSIM ≥ 0.5 and the dissimilarity of the nearest
public image is lessened by 30 %, at which pictures without any gradient (*prior alone*) do not pass (heart: every
feature within 1 % of range). ε is of *one* round: less noise than
any run of many rounds would have. Data: $ATOLL_DATA or ../shared/data.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from dp_accounting import GaussianDpEvent
from numpy.typing import NDArray

from atoll.audit.audit import Attack, Leak, Subject, attack_rounds
from atoll.audit.imprint import imprint
from atoll.audit.leak import wilson
from atoll.audit.membership import lira, loss_threshold, ridge
from atoll.audit.network import Layers, batch_gradient
from atoll.audit.property_inference import infer_property, shadow_updates
from atoll.audit.subjects import cnn_subject, linear_subject, pixels, scaled_rows
from atoll.audit.view import Batch, Kind, Protection, observe
from atoll.contract.schema import TableSchema
from atoll.models.cnn import Cnn, CnnSpec
from atoll.models.linear import LinearModel
from atoll.privacy.dp.accounting import calibrate
from benchmarks.table import Row, main

SEED = 7
SAMPLES = 300
EPSILON, DELTA, CLIP = 8.0, 1e-5, 1.0
BATCHES = (1, 8, 64)
SEARCHED: Mapping[int, int] = {1: 48, 8: 48, 64: 128}
"""Samples attacked by the searches, by batch size."""
PUBLISHED_PLAIN, PUBLISHED_PROTECTED = 8.7, 1.2
NAMES: Mapping[str, str] = {
    "linear-layer": "exact", "imprint": "lying", "generative": "generative",
    "inverting-gradients": "Inverting Gradients", "no-gradient": "prior alone",
}  # fmt: skip
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data"))
EXAMPLES = Path(__file__).parents[1] / "examples"


def rounds(x: torch.Tensor, y: torch.Tensor, sites: int, batch: int, samples: int) -> list[Mapping[str, Batch]]:
    """At least *samples* samples, in rounds of one batch a hospital; as many as there are, drawn again beyond that."""
    number = math.ceil(samples / (sites * batch))
    order = np.random.default_rng(SEED).permutation(len(x))
    order = np.resize(order, number * sites * batch).reshape(number, sites, batch)
    return [{f"hospital-{s}": (x[one], y[one]) for s, one in enumerate(of_round)} for of_round in order]


def attacked_by(
    attack: Attack, subject: Subject, attacked: Sequence[Mapping[str, Batch]], protection: Protection, only: str | None,
    seed: int = SEED,
) -> Leak:  # fmt: skip
    """One attack on what of each round the coordinator saw; *only*: one kind of it."""
    if attack == "imprint":
        layers = Layers.of(subject.model, subject.scale(subject.public[:1]))
        if layers is not None:
            subject = replace(subject, model=imprint(subject.model, layers, subject.scale(subject.public)))
    random = np.random.default_rng(seed)
    seen = []
    for sites in attacked:
        scaled = {name: (subject.scale(x), y) for name, (x, y) in sites.items()}
        seen.append([o for o in observe(subject.model, scaled, protection, random) if only in (None, o.what)])
    known: Attack = "linear-layer" if attack == "imprint" else attack
    (leak,) = attack_rounds(subject, attacked, protection, (known,), seed=seed, steps=200, captured=seen)
    return replace(leak, attack=attack)


def row(study: str, batch: int, view: str, leak: Leak, protected: bool, note: str = "") -> Row:
    """One cell, told on stderr as soon as it is there (a run takes minutes)."""
    hits, tried = int(leak.leaked.sum()), len(leak.leaked)
    low, high = wilson(hits, tried)
    told = f"{hits} of {tried}, 95 %: {low:.1%} to {high:.1%}"
    if leak.images is not None:
        told += f"; mean SSIM {leak.score.clip(0).mean():.2f}"
    made = Row(
        f"{study}, batch {batch}, {view}: {NAMES[leak.attack]}", 100 * hits / tried, "%",
        PUBLISHED_PROTECTED if protected else PUBLISHED_PLAIN, 0.0 if protected else None, f"{told}{note}",
    )  # fmt: skip
    print(json.dumps([made.name, made.value, made.note], ensure_ascii=False), file=sys.stderr, flush=True)
    return made


def cells(
    study: str, subject: Subject, x: torch.Tensor, y: torch.Tensor, attacks: Sequence[Attack], samples: int,
    batches: Sequence[int], views: Sequence[tuple[str, Kind, int, str | None]], noise_multiplier: float,
) -> list[Row]:  # fmt: skip
    """The table of one study."""
    found = []
    for batch in batches:
        for name, kind, sites, only in views:
            protection = Protection(kind, CLIP, noise_multiplier, EPSILON) if "dp" in kind else Protection(kind)
            for attack in attacks:
                search = attack in ("generative", "inverting-gradients")
                if (search and only == "masked") or (attack == "no-gradient" and kind != "plain"):
                    continue  # a masked vector is uniform, whatever it hides: the exact attack stands for all
                attacked = rounds(x, y, sites, batch, min(samples, SEARCHED[batch]) if search else samples)
                leak = attacked_by(attack, subject, attacked, protection, only)
                found.append(row(study, batch, name, leak, kind != "plain"))
    return found


VIEWS: Sequence[tuple[str, Kind, int, str | None]] = (
    ("plain, 2 hospitals", "plain", 2, None),
    (f"dp ε = {EPSILON:g}, 2 hospitals", "dp", 2, None),
    ("secagg, masked vectors of 2 hospitals", "secagg", 2, "masked"),
    ("secagg, masked vectors of 3 hospitals", "secagg", 3, "masked"),
    ("secagg, sum of 2 hospitals", "secagg", 2, "sum"),
    ("secagg, sum of 3 hospitals", "secagg", 3, "sum"),
    (f"both ε = {EPSILON:g}, 2 hospitals", "secagg+dp", 2, None),
    (f"both ε = {EPSILON:g}, 3 hospitals", "secagg+dp", 3, None),
)


# ---------------------------------------------------------------- heart: logistic regression


def heart(samples: int, noise_multiplier: float) -> list[Row]:
    """Ten features of 920 patients, as the plan of examples/heart has them, missing cells by their mean."""
    schema = TableSchema.model_validate(
        yaml.safe_load((EXAMPLES / "heart" / "schema.yaml").read_text(encoding="utf-8"))
    )
    names = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak"]
    columns = [*names, "slope", "ca", "thal", "num"]
    files = sorted((DATA / "heart-disease-uci").glob("processed.*.data"))
    table = pd.concat([pd.read_csv(file, header=None, names=columns, na_values="?") for file in files])
    table = table.fillna(table.mean())
    columns_of = {name: {"dtype": "real", "range": list(schema.columns[name].bounds())} for name in names}
    label = {"dtype": "integer", "values": [0, 1], "role": "label"}
    contract = {"name": "heart", "version": "1", "max_rows": len(table), "columns": {**columns_of, "disease": label}}
    numeric = TableSchema.model_validate(contract)
    model = LinearModel.zero("logistic", numeric, tuple(names), "disease")
    x = scaled_rows(model, table[names].to_numpy(np.float64))
    y = torch.from_numpy((table["num"] > 0).to_numpy(np.float32))
    subject = linear_subject(model, table[names].to_numpy(np.float64)[:0])
    found = cells("heart", subject, x, y, ("linear-layer",), samples, BATCHES, VIEWS, noise_multiplier)
    return [*found, *properties(subject, x, y, noise_multiplier), *members(x.double().numpy(), y.double().numpy())]


def properties(subject: Subject, x: torch.Tensor, y: torch.Tensor, noise_multiplier: float) -> list[Row]:
    """Whether 40 % or 60 % of the first hospital's batch of 64 are ill; shadow updates are of other patients."""
    halves = np.array_split(np.random.default_rng(SEED).permutation(len(x)), 2)
    found = []
    for name, kind, sites, only in VIEWS:
        protection = Protection(kind, CLIP, noise_multiplier, EPSILON) if "dp" in kind else Protection(kind)
        random = np.random.default_rng(SEED)
        made = []
        for half in halves:
            own_x, own_y = x[half], y[half]

            def update(
                chosen: NDArray[np.int64], own_x: torch.Tensor = own_x, own_y: torch.Tensor = own_y,
                sites: int = sites, protection: Protection = protection, only: str | None = only,
                random: np.random.Generator = random,
            ) -> NDArray[np.float64]:  # fmt: skip
                others = [random.choice(len(own_x), 64) for _ in range(sites - 1)]
                batches = {f"hospital-{s}": (own_x[rows], own_y[rows]) for s, rows in enumerate((chosen, *others))}
                seen = observe(subject.model, batches, protection, random)
                shown = seen[0] if only == "masked" or protection.kind in ("plain", "dp") else seen[-1]
                return torch.cat([g.flatten() for g in shown.gradient.values()]).double().numpy()

            made.append(shadow_updates(update, own_y.double().numpy(), (0.4, 0.6), 64, 300, SEED))
        (shadows, has), (observed, truth) = made
        auc = infer_property(shadows, has, observed, truth)
        found.append(Row(f"heart, batch 64, {name}: share of the ill", auc, "AUC", None, None, "0.5 is chance"))
    return found


def members(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[Row]:
    """Who was among the half that a linear model was fitted to: the same under all views, but for DP's noise."""
    member = np.random.default_rng(SEED).permutation(len(x)) < len(x) // 2
    train = ridge()
    fitted = train(x[member], y[member])
    found = {"loss threshold": loss_threshold(fitted, x, y, member), "LiRA": lira(fitted, train, x, y, member)}
    return [
        Row(f"heart, fitted model: membership by {name}", one.auc, "AUC", None, None,
            f"0.5 is chance; {one.tpr_at_1_fpr:.1%} of members found at 1 % false")
        for name, one in found.items()
    ]  # fmt: skip


# ---------------------------------------------------------------- pneumonia: CNN


def pneumonia_model() -> Cnn:
    """The CNN of examples/pneumonia."""
    schema = yaml.safe_load((EXAMPLES / "pneumonia" / "schema.yaml").read_text(encoding="utf-8"))
    plan = yaml.safe_load((EXAMPLES / "pneumonia" / "plan.yaml").read_text(encoding="utf-8"))
    settings = {**plan["params"]["model"], "target": plan["params"]["target"]}
    return Cnn.of(CnnSpec.model_validate(settings), TableSchema.model_validate(schema))


def trained(subject: Subject, x: torch.Tensor, y: torch.Tensor, number: int) -> None:
    """*number* rounds of one step of 64 samples, in place."""
    random = np.random.default_rng(SEED)
    for _ in range(number):
        chosen = random.choice(len(x), 64, replace=False)
        step = batch_gradient(subject.model, subject.scale(x[chosen]), y[chosen])
        with torch.no_grad():
            for name, value in subject.model.named_parameters():
                value.sub_(0.05 * step[name])


def passes(
    study: str, subject: Subject, x: torch.Tensor, y: torch.Tensor, attack: Attack, protection: Protection, sites: int,
    times: int, only: str | None,
) -> Row:  # fmt: skip
    """Batches of 64 of each hospital's 128, shuffled anew in each of *times* passes: what leaks at least once."""
    random, size = np.random.default_rng(SEED), 128
    owned = random.permutation(len(x))[: sites * size].reshape(sites, size)
    leaked: NDArray[np.bool_] = np.zeros(len(x), bool)
    for number in range(times):
        orders = [random.permutation(own).reshape(-1, 64) for own in owned]
        shown = [[order[i] for order in orders] for i in range(size // 64)]
        attacked: list[Mapping[str, Batch]] = [
            {f"hospital-{s}": (x[rows], y[rows]) for s, rows in enumerate(one)} for one in shown
        ]
        leak = attacked_by(attack, subject, attacked, protection, only, SEED + number)
        leaked[np.concatenate([rows for one in shown for rows in one])[leak.leaked]] = True
    whole = Leak(attack, leaked[owned.flatten()], np.zeros(owned.size))
    return row(study, 64, f"{protection.kind}, {sites} hospitals, {times} passes", whole, protection.kind != "plain")


def pneumonia(samples: int, noise_multiplier: float, quick: bool) -> list[Row]:
    """The official training images, in random halves or thirds."""
    with np.load(DATA / "pneumonia-mnist" / "pneumoniamnist.npz") as file:
        x, y = pixels(file["train_images"]), torch.from_numpy(file["train_labels"][:, 0].astype(np.float32))
        public = file["val_images"]
    model = pneumonia_model()
    subject = cnn_subject(model, model.initial(SEED), public)
    batches = BATCHES[:2] if quick else BATCHES
    certain: tuple[Attack, ...] = ("linear-layer", "imprint", "no-gradient")
    found = cells("pneumonia", subject, x, y, certain, samples, batches, VIEWS, noise_multiplier)
    if quick:
        return found
    for times in (10,):
        for attack in ("linear-layer", "imprint"):
            for protection, sites, only in (
                (Protection("plain"), 3, None),
                (Protection("secagg"), 3, "sum"),
                (Protection("secagg+dp", CLIP, noise_multiplier, EPSILON), 3, "sum"),
            ):
                found.append(passes("pneumonia", subject, x, y, attack, protection, sites, times, only))
    searches: tuple[Attack, ...] = ("generative", "inverting-gradients")
    views = [VIEWS[i] for i in (0, 1, 5, 7)]
    found += cells("pneumonia", subject, x, y, searches, samples, batches, views, noise_multiplier)
    trained(subject, x, y, 30)
    return found + cells(
        "pneumonia after 30 rounds", subject, x, y, ("linear-layer",), samples, batches, VIEWS[:1], noise_multiplier
    )


def measure(quick: bool) -> list[Row]:
    """All cells."""
    torch.set_num_threads(1)
    samples = 24 if quick else SAMPLES
    multiplier = calibrate(EPSILON, DELTA, lambda z: [(GaussianDpEvent(z), 1)])
    stated: list[Any] = [Row(f"noise multiplier of ε = {EPSILON:g}, δ = {DELTA:g}, one round", multiplier, "")]
    return [*stated, *heart(samples, multiplier), *pneumonia(samples, multiplier, quick)]


if __name__ == "__main__":
    main("leakage", ("atoll", "torch", "numpy", "scipy", "dp-accounting"), measure, SEED)
