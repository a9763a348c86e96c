"""Texts: taken apart by the papers' rules, and networks equal to a second writing of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.model import make
from atoll.models.text import bucket, filled, hashed, letters, runs, words

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from atoll.models.series_transformer import positions  # noqa: E402

TEXTS = [
    "Flood water is rising at the bridge", "the bridge is closed", "we need boats, water and food!", "Lovely sunshine",
    "sunshine at the beach", "new phone, who is this", "boats at the bridge: need help", "lovely food; the beach too",
]  # fmt: skip
LABELS = [1, 1, 1, 0, 0, 0, 1, 0]
TARGETS: dict[str, dict[str, Any]] = {
    "binary": {"dtype": "integer", "values": [0, 1]},
    "classes": {"dtype": "integer", "values": [3, 0, 1]},
    "regression": {"range": [-10, 30]},
}
SMALL: dict[str, dict[str, Any]] = {
    "embedding_bag": {"buckets": 50, "width": 5, "length": 90},
    "text_transformer": {"buckets": 50, "width": 8, "heads": 2, "layers": 2, "length": 9},
}


def table_of(texts: list[Any] = TEXTS, task: str = "binary") -> Table:
    columns = {"says": Column(dtype="text"), "y": Column(**TARGETS[task], role="label"), "n": Column(range=(0, 1))}
    y = np.array((LABELS * len(texts))[: len(texts)], float)
    data = {"says": np.array(texts, object), "y": y, "n": np.zeros(len(texts))}
    return Table(TableSchema(name="test", columns=columns), data)


def model_of(kind: str, table: Table, **more: Any) -> Any:
    return make({"kind": kind, "text": "says", "target": "y", **SMALL[kind], **more}, table.schema)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Help! Water's rising_fast #NYCflood 2nd", ["help", "water", "s", "rising", "fast", "nycflood", "2nd"]),
        ("@Ann see https://t.co/x1 or www.who.int", ["<user>", "see", "<url>", "or", "<url>"]),
        ("桥已关闭 now", ["桥", "已", "关", "闭", "now"]),
        ("Überschwemmung наводнение", ["überschwemmung", "наводнение"]),
        (" ... ", []),
    ],
)
def test_words_are_runs_of_letters_and_digits(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


def test_runs_of_letters_are_the_papers() -> None:
    """Bojanowski et al. 2017, §3.2: "where" and n = 3 give <wh, whe, her, ere, re>."""
    assert list(letters("where", (3, 3))) == ["<wh", "whe", "her", "ere", "re>"]
    assert list(letters("a", (2, 5))) == ["<a", "a>"]
    assert list(runs(["a", "b", "c"], 2)) == ["a", "b", "c", "a b", "b c"]


def test_the_hash_is_the_published_one_on_every_machine() -> None:
    """CRC-32's check value; and the same in another process, whatever seed Python hashes strings with."""
    assert crc32(b"123456789") == 0xCBF43926
    assert bucket("123456789", 1000) == 0xCBF43926 % 999 + 1
    code = "from atoll.models.text import bucket; print([bucket(w, 8192) for w in ('water', '桥', '<url>')])"
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str([bucket(w, 8192) for w in ("water", "桥", "<url>")])
    places = {bucket(str(i), 100) for i in range(5000)}
    assert places == set(range(1, 100))  # 0 is no word's


def test_texts_are_cut_and_filled_up() -> None:
    found = hashed(np.array(["a b c", "", "d"], object), 2, lambda found: iter(len(w) for w in found))
    assert found.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert filled(np.array([[3, 0, 0], [4, 5, 0]], np.int32)).tolist() == [[3, 0], [4, 5]]
    assert filled(np.zeros((2, 3), np.int32)).tolist() == [[0], [0]]


def test_a_bag_is_the_mean_of_its_words() -> None:
    """Written a second time: the log-odds are w · mean of the rows of all terms + b."""
    table = table_of([*TEXTS, ""])
    model = model_of("embedding_bag", table, words=2, letters=[3, 4])
    weights = model.initial(1)
    rows = weights[model.layers["encoder.words.weight"]].reshape(50, 5)
    head, offset = weights[model.layers["head.weight"]], weights[model.layers["head.bias"]]
    assert list(model.layers) == ["encoder.words.weight", "head.weight", "head.bias"]
    for text, found in zip(table["says"], model.with_weights(weights).predict(table), strict=True):
        said = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        terms = [*said, *map(" ".join, pairwise(said))]
        for edged in (f"<{word}>" for word in said):
            terms += [edged[i : i + n] for n in (3, 4) for i in range(len(edged) - n + 1) if n < len(edged)]
        mean = np.mean([rows[crc32(term.encode()) % 49 + 1] for term in terms], 0) if terms else np.zeros(5)
        assert found == pytest.approx(float(1 / (1 + np.exp(-(mean @ head + offset[0])))), abs=1e-6)


def test_the_transformer_is_pytorchs() -> None:
    table = table_of([*TEXTS, ""])
    model = model_of("text_transformer", table)
    weights = model.initial(1)
    model.load(weights)
    ours = dict(model.net.encoder.named_parameters())
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False).eval()
    for i, one in enumerate(theirs.layers):
        of = {name.removeprefix(f"layers.{i}."): p for name, p in ours.items() if name.startswith(f"layers.{i}.")}
        asked = ("query", "key", "value")
        one.self_attn.in_proj_weight.data = torch.cat([of[f"attention.{name}.weight"] for name in asked])
        one.self_attn.in_proj_bias.data = torch.cat([of[f"attention.{name}.bias"] for name in asked])
        pairs = {
            "self_attn.out_proj": "attention.out", "norm1": "norm", "norm2": "forward_part.0",
            "linear1": "forward_part.1", "linear2": "forward_part.3",
        }  # fmt: skip
        for their, our in pairs.items():
            for name in ("weight", "bias"):
                one.get_parameter(f"{their}.{name}").data = of[f"{our}.{name}"]
    theirs.norm.weight.data, theirs.norm.bias.data = ours["norm.weight"], ours["norm.bias"]
    [places] = model.tensors(model.inputs(table))
    full = places[:-1]  # PyTorch's gives NaN for a text without words
    with torch.no_grad():
        x = ours["words.weight"][full] * 8**0.5 + positions(full.shape[1], 8)
        out = theirs(x, src_key_padding_mask=full == 0)
        wanted = [row[there].mean(0) for row, there in zip(out, full > 0, strict=True)]
        found = model.net.encoder(places)
    assert torch.allclose(found[:-1], torch.stack(wanted), atol=1e-5)
    assert (found[-1] == 0).all()


@pytest.mark.parametrize("kind", SMALL)
def test_what_fills_up_counts_for_nothing(kind: str) -> None:
    table = table_of([*TEXTS, ""])
    model = model_of(kind, table)
    weights = model.initial(1)
    longer = model_of(kind, table, length=200).with_weights(weights).predict(table)
    found = model.with_weights(weights).predict(table)
    assert np.allclose(found, longer, atol=1e-6)
    assert found[-1] == pytest.approx(0.5)  # no word: the head's offset
    alone = model.with_weights(weights).predict(table.rows(np.arange(9) == 1))
    assert alone[0] == pytest.approx(found[1], abs=1e-6)
    spread = weights[model.layers["encoder.words.weight"]].reshape(50, -1)
    spread[0] = 1e3  # nobody's place
    assert np.array_equal(model.with_weights(weights).predict(table), found)
    gradient = model.loss_and_gradient(weights, model.examples(table))[1]
    assert (gradient[model.layers["encoder.words.weight"]].reshape(50, -1)[0] == 0).all()


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("kind", SMALL)
def test_clipping_equals_clipping_one_after_another(kind: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of([*TEXTS, ""], task)
    model = model_of(kind, table)
    weights, batch = model.initial(3), model.examples(table)
    each = [model.loss_and_gradient(weights, batch.take(slice(i, i + 1))) for i in range(len(batch))]
    norms = np.array([np.linalg.norm(gradient) for _, gradient in each])
    for clip in (1.01 * float(np.median(norms)), 1e-3, 1e6):
        wanted = sum(g * min(1, clip / n) for (_, g), n in zip(each, norms, strict=True))
        for formed in (1 << 24, 3 * len(weights)):
            monkeypatch.setattr("atoll.models.network.FORMED", formed)
            total, clipped, loss = model.clipped_gradient_sum(weights, batch, clip)
            assert np.allclose(total, wanted, rtol=0, atol=3e-5 * max(1e-3, np.linalg.norm(wanted)))
            assert clipped == (norms > clip).sum()
            assert loss == pytest.approx(sum(one for one, _ in each), rel=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_networks_that_cannot_be_are_refused_without_data(kind: str) -> None:
    for column in ("n", "gone"):
        with pytest.raises(PlanError) as caught:
            model_of(kind, table_of(), text=column)
        assert (caught.value.code, caught.value.field) == ("plan.bad-column", column)
    for odd, more in (("text_transformer", {"width": 6}), ("embedding_bag", {"letters": [0, 3]})):
        with pytest.raises(PlanError):
            model_of(odd, table_of(), **more)
    with pytest.raises(SchemaError) as missing:
        model_of(kind, table_of()).examples(table_of([*TEXTS, None]))
    assert (missing.value.code, missing.value.field) == ("schema.missing", "says")


@pytest.mark.parametrize(("kind", "rate"), [("embedding_bag", 2.0), ("text_transformer", 0.1)])
def test_offices_learn_what_the_words_say(drive: Any, kind: str, rate: float) -> None:
    """Three offices, of which none has all words: together they tell all texts apart."""
    tables = {f"office{i}": table_of(TEXTS).rows(np.arange(8) % 4 != i) for i in range(3)}
    params = {
        "target": "y", "model": {"kind": kind, "text": "says", **SMALL[kind], "buckets": 500},
        "rounds": 20, "local_epochs": 2, "batch_size": 4, "learning_rate": rate,
    }  # fmt: skip
    cohort = Cohort(tuple(tables), table_of().schema, seed=1)
    fitted = drive(build("horizontal.fedavg", params).coordinate(cohort), tables).result["model"]
    assert ((fitted.predict(table_of()) > 0.5) == np.array(LABELS)).all()
