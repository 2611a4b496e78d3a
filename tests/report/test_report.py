"""The report: one file, user content escaped, no script but the report's, findings that hold."""

import builtins
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from hostile_strings import HOSTILE
from lightning_models import loader, quiet_trainer
from reported_runs import TextClassifier, Texts, report_on_texts
from torch.utils.data import Subset, TensorDataset
from unchecked_calls import type_checks_disabled

from tda_lightning import GradientRecorder, Identity, Unrolled, attribute
from tda_lightning.applications import Duplicates, find_mislabeled
from tda_lightning.attribution import Averaged
from tda_lightning.metrics import rank_agreement
from tda_lightning.report import Case, Finding, RemovalCurve, Shown, report
from tda_lightning.report.findings.labels import number_set_apart
from tda_lightning.report.findings.training_data import near_copies
from tda_lightning.report.page.html import visible

# Some reports are of a model that was not trained.
pytestmark = pytest.mark.filterwarnings("ignore:The weights or running statistics of `model`")
TEXTS = [f"text number {i}" for i in range(23)]


class Parsed(HTMLParser):
    """The scripts, the addresses and the texts of a page, as a browser splits them."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.addresses, self.handlers, self.texts = [], [], [], []
        self.cases = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        pairs = dict(attrs)
        if "data-query" in pairs:
            samples = [int(sample) for sample in pairs["data-samples"].split()]
            self.cases.append((int(pairs["data-query"]), samples))
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, content):
        if self.scripts and self.scripts[-1][1] == "" and self.lasttag == "script":
            self.scripts[-1] = (self.scripts[-1][0], content)
        else:
            self.texts.append(content)

    def data(self):
        return next(json.loads(text) for attrs, text in self.scripts if attrs.get("id") == "data")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return Parsed(report_on_texts(folder, HOSTILE, class_names=HOSTILE[:3], title=HOSTILE[1]))


def test_hostile_content_adds_no_script_no_handler_and_no_address(hostile):
    kinds = [attributes.get("type", "code") for attributes, _ in hostile.scripts]
    assert kinds == ["application/json"] * (len(kinds) - kinds.count("code")) + ["code"] * 5
    assert hostile.handlers == []
    assert all(address.startswith("#") for address in hostile.addresses)


def test_hostile_content_is_in_the_data(hostile):
    texts = {query["text"] for query in hostile.data()["queries"]}
    assert texts == {visible(text) for text in HOSTILE}


def test_every_shown_sample_is_in_the_data_once(hostile):
    data = hostile.data()
    shown = {
        i for query in data["queries"] for side in ("helped", "harmed") for i, _ in query[side]
    }
    assert shown <= {int(sample) for sample in data["samples"]}
    assert sorted(data["ranking"]["ids"]) == list(range(len(HOSTILE)))


def test_proponents_have_positive_scores_and_opponents_negative_ones(hostile):
    for query in hostile.data()["queries"]:
        assert all(score > 0 for _, score in query["helped"])
        assert all(score < 0 for _, score in query["harmed"])


def test_the_page_shows_the_scores_of_attribute_and_how_far_its_two_methods_agree(tmp_path):
    trained = {}

    def keep(module, batch):
        trained.setdefault("model", module)
        return module(batch["x"])

    parsed = Parsed(report_on_texts(tmp_path, TEXTS, outputs=keep))
    data, model = Texts(TEXTS), trained["model"]
    arguments = (tmp_path / "run.tda", model, loader(data, batch_size=10, shuffle=False))
    scores = attribute(*arguments, progress=False)
    parts = [attribute(*arguments, method=m, progress=False) for m in Averaged().methods]
    agreement = rank_agreement(*parts)
    for query in parsed.data()["queries"]:
        best = scores[query["id"]].highest(2)
        assert [i for i, _ in query["helped"][:2]] == best.ids.tolist()
        assert query["helped"][0][1] == pytest.approx(float(best.values[0]), rel=1e-2)
        assert query["agreement"] == pytest.approx(float(agreement[query["id"]]), abs=0.01)
    assert "Rank correlation of Unrolled and InfluenceFunction" in " ".join(parsed.texts)


def test_the_page_shows_why_labels_may_be_missed_but_no_advice_on_arguments(tmp_path):
    text = " ".join(Parsed(report_on_texts(tmp_path, TEXTS)).texts)
    doubts = text.partition("This could be a false all-clear")[2]
    notes = find_mislabeled(tmp_path / "run.tda", progress=False).notes
    assert any(note.remedy.startswith("Pass `model`") for note in notes)
    assert all(note.reason in doubts for note in notes)
    assert "Pass" not in doubts


def test_one_method_alone_has_nothing_to_agree_with(tmp_path):
    parsed = Parsed(report_on_texts(tmp_path, TEXTS, method=Unrolled()))
    assert all(query["agreement"] is None for query in parsed.data()["queries"])
    assert "Only one method was used." in " ".join(parsed.texts)


def test_wrong_answers_come_first(hostile):
    wrong = [query["wrong"] for query in hostile.data()["queries"]]
    assert wrong == sorted(wrong, reverse=True)
    assert any(wrong)


def test_wrong_answers_stand_beside_their_strongest_opponents(hostile):
    wrong = [query for query in hostile.data()["queries"] if query["wrong"]]
    expected = [(query["id"], [i for i, _ in query["harmed"][:3]]) for query in wrong[:12]]
    assert hostile.cases == expected


def test_labels_of_a_megabyte_are_shortened(tmp_path):
    path = report_on_texts(tmp_path, [*TEXTS[:10], "a" * 2**20], class_names=["b" * 2**20] * 3)
    parsed = Parsed(path)
    assert path.stat().st_size < 4 * 2**20
    assert any("more characters" in query["label"] for query in parsed.data()["queries"])


def test_the_same_text_twice_is_a_copy(tmp_path):
    class Copies(Texts):
        def __getitem__(self, index):
            return super().__getitem__(0 if index == 3 else index) | {"label": self.labels[index]}

    path = report_on_texts(tmp_path, TEXTS)
    model, data = TextClassifier(), Copies(TEXTS)
    data.labels[3] = 1 - data.labels[0] if data.labels[0] < 2 else 0
    queries = loader(data, shuffle=False)
    report(tmp_path / "run.tda", model, queries, train=data, out=path, progress=False)
    text = " ".join(Parsed(path).texts)
    assert "1 training sample repeats the contents of another one." in text
    assert "In 1 group of copies the labels contradict each other" in text


@pytest.mark.parametrize(("n_grouped", "weight"), [(4, "attention"), (5, "unknown")])
def test_near_copies_are_unknown_where_many_samples_have_the_same_gradient(n_grouped, weight):
    n = 20
    group = torch.arange(n_grouped)
    found = Duplicates((group,), torch.arange(n), torch.ones(n), None, 0.98, ())
    evidence = SimpleNamespace(duplicates=found, train=SimpleNamespace(copies=()))
    with type_checks_disabled():
        assert near_copies(evidence).weight == weight


def test_without_bokeh_charts_are_drawn_as_svg(tmp_path, monkeypatch):
    monkeypatch.setattr("tda_lightning.report.api.has_bokeh", lambda: False)
    path = report_on_texts(tmp_path, TEXTS)
    text = path.read_text(encoding="utf-8")
    assert text.count("<svg") == 5
    assert "BokehJS" not in text
    assert "currentColor" in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:xlink:href="|url\()#([\w-]+)', text)
    assert references
    assert set(references) <= set(ids)
    assert path.stat().st_size < 2**20


def test_without_any_library_for_charts_the_extra_is_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_matplotlib(name, *arguments):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("there is none", name="matplotlib")
        return original(name, *arguments)

    monkeypatch.setattr("tda_lightning.report.api.has_bokeh", lambda: False)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ModuleNotFoundError, match=r"tda_lightning\[report\]"):
        report_on_texts(tmp_path, TEXTS)


def test_render_decides_how_samples_are_shown(tmp_path):
    path = report_on_texts(
        tmp_path, TEXTS, render=lambda item: Shown(text=item["text"].upper(), note="a note")
    )
    assert {(query["text"], query["note"]) for query in Parsed(path).data()["queries"]} == {
        (text.upper(), "a note") for text in TEXTS
    }


def test_further_findings_come_first(tmp_path):
    finding = Finding("A watermark <b>", ("It is & remains.",), "attention", (3, 5))
    texts = Parsed(report_on_texts(tmp_path, TEXTS, findings=[finding])).texts
    assert texts.index("A watermark <b>") < texts.index("Wrong answers")
    assert "It is & remains." in texts
    outside = Finding("Other", (), "fine", cases=(Case(23, (3,)),))
    with pytest.raises(ValueError, match="`Other` names query 23; expected positions from 0 to 22"):
        report_on_texts(tmp_path / "once", TEXTS, findings=[outside])
    unknown = Finding("Other", (), "fine", (99,))
    with pytest.raises(ValueError, match="The finding `Other` names sample 99, which is not"):
        report_on_texts(tmp_path / "again", TEXTS, findings=[unknown])


def stamped_texts(is_stamped):
    """Return samples of three classes, some of which have a stamp."""
    texts = Texts([f"text number {i}" for i in range(90)])
    texts.labels = [i % 3 for i in range(90)]
    classes = torch.eye(7)[:3][texts.labels]
    texts.vectors = 0.3 * texts.vectors + classes + 4 * torch.eye(7)[6] * is_stamped[:, None]
    return texts


def test_a_stamp_that_drives_wrong_answers_is_a_shortcut(tmp_path):
    labels = torch.arange(90) % 3
    is_stamped = (labels == 2) & (torch.arange(90) % 4 > 0)
    train, model = stamped_texts(is_stamped), TextClassifier()
    recorder = GradientRecorder(tmp_path / "run.tda", projector=Identity())
    quiet_trainer(recorder, max_epochs=7).fit(model, loader(train, batch_size=15))
    is_even = torch.arange(90) % 2 == 0
    page = report(
        tmp_path / "run.tda",
        model,
        loader(stamped_texts(labels < 2), batch_size=45, shuffle=False),
        train=train,
        out=tmp_path / "report.html",
        attributes={"even": is_even, "stamp": is_stamped},
        progress=False,
    )
    text = " ".join(Parsed(page).texts)
    assert "The attribute “stamp” of training samples drives the wrong answers." in text
    assert "“even”" in text


def test_without_attributes_no_shortcut_is_claimed_or_denied(hostile):
    assert "Shortcuts were not searched" in hostile.texts
    assert any("No attribute was tested as a shortcut" in text for text in hostile.texts)


def test_a_removal_curve_is_shown_with_its_check(tmp_path):
    curve = RemovalCurve([1, 3], {"Unrolled": [0.1, 0.25], "random": [0.0, 0.05]})
    parsed = Parsed(report_on_texts(tmp_path, TEXTS, removal=curve))
    assert "+0.25" in parsed.texts
    assert any("without as many random ones it is +0.05" in text for text in parsed.texts)
    assert any("At the end, Unrolled: +0.25; random: +0.05." in text for text in parsed.texts)
    with pytest.raises(ValueError, match=r"`changes\['random'\]` has 1 values; expected 2"):
        RemovalCurve([1, 3], {"random": [0.0]})
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        RemovalCurve([1, 3], {"random": [0.0, float("nan")]})


def test_render_must_return_how_a_sample_is_shown(tmp_path):
    with pytest.raises(ValueError, match="`render` returned a `str`; expected a `Shown`"):
        report_on_texts(tmp_path, TEXTS, render=lambda item: "text")


def test_a_dataset_that_is_too_short_is_refused(tmp_path):
    path = report_on_texts(tmp_path, TEXTS)
    model, data = TextClassifier(), Texts(TEXTS)
    queries = loader(data, shuffle=False)
    short = TensorDataset(torch.zeros(5, 7))
    with pytest.raises(ValueError, match="`train` has 5 samples, and the run has ids from 0 to 22"):
        report(tmp_path / "run.tda", model, queries, train=short, out=path, progress=False)
    with pytest.raises(ValueError, match="`train` is a `DataLoader`; expected the dataset"):
        report(tmp_path / "run.tda", model, queries, train=queries, out=path, progress=False)


def test_a_subset_is_read_below_itself(tmp_path):
    path = report_on_texts(tmp_path, TEXTS)
    whole = path.read_text(encoding="utf-8")
    model, data = TextClassifier(), Texts(TEXTS)
    model.load_state_dict(model.state_dict())
    queries = loader(data, shuffle=False)
    arguments = (tmp_path / "run.tda", model, queries)
    report(*arguments, train=data, out=path, progress=False)
    whole = Parsed(path).data()
    report(*arguments, train=Subset(data, [2, 3]), out=path, progress=False)
    assert Parsed(path).data() == whole


def test_a_model_without_forward_is_reported_on_without_predictions(tmp_path):
    class NoForward(TextClassifier):
        forward = torch.nn.Module.forward

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.head(batch["x"]), batch["label"])

    path = report_on_texts(tmp_path, TEXTS)
    queries = loader(Texts(TEXTS), shuffle=False)
    report(tmp_path / "run.tda", NoForward(), queries, train=Texts(TEXTS), out=path, progress=False)
    parsed = Parsed(path)
    assert "The model's answers are unknown" in " ".join(parsed.texts)
    assert not any(query["known"] for query in parsed.data()["queries"])


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)], ids=["vector", "column"])
def test_one_logit_stands_for_two_classes(tmp_path, shape):
    class TwoClasses(TextClassifier):
        def forward(self, x):
            return self.head(x)[:, 0].reshape(shape)

        def training_step(self, batch, batch_idx):
            labels = batch["label"].float().reshape(shape)
            return torch.nn.functional.binary_cross_entropy_with_logits(self(batch["x"]), labels)

    data, model = Texts(TEXTS, classes=2), TwoClasses()
    data.labels = [float(label) for label in data.labels]
    run, path = tmp_path / "run.tda", tmp_path / "report.html"
    quiet_trainer(GradientRecorder(run, projector=Identity())).fit(model, loader(data))
    queries, names = loader(data, shuffle=False), ["no", "yes"]
    settings = {"train": data, "out": path, "class_names": names, "progress": False}
    report(run, model, queries, **settings)
    logits = model(data.vectors).flatten().detach()
    for query in Parsed(path).data()["queries"]:
        logit, label = float(logits[query["id"]]), int(data.labels[query["id"]])
        assert (query["answer"], query["label"]) == (names[logit > 0], names[label])
        assert query["wrong"] == ((logit > 0) != label)
        assert query["confidence"] == pytest.approx(1 / (1 + math.exp(-abs(logit))), rel=1e-4)

    def probabilities(module, batch):
        return module(batch["x"]).sigmoid()

    report(run, model, queries, outputs=probabilities, **settings)
    assert "as behind a sigmoid; expected logits." in " ".join(Parsed(path).texts)
    assert not any(query["known"] for query in Parsed(path).data()["queries"])
    model.forward = lambda x: model.head(x)[:, 0].squeeze()
    with pytest.raises(ValueError, match=r"failed on (a batch of one query|`queries`): "):
        report(run, model, queries, **settings)


def test_opponents_are_a_finding_only_if_an_answer_is_wrong(tmp_path):
    path = report_on_texts(tmp_path, TEXTS)
    queries = loader(Texts(TEXTS), shuffle=False)
    for shift, is_found in ((0, False), (1, True)):

        def answers(module, batch, shift=shift):
            return torch.nn.functional.one_hot((batch["label"] + shift) % 3, 3) * 9.0

        arguments = (tmp_path / "run.tda", TextClassifier(), queries)
        report(*arguments, train=Texts(TEXTS), out=path, outputs=answers, progress=False)
        texts = Parsed(path).texts
        assert ("The same samples harm again and again" in texts) == is_found
        assert ("No wrong answers" in texts) != is_found


def test_queries_without_classes_are_reported_on(tmp_path):
    class Regression(TextClassifier):
        def training_step(self, batch, batch_idx):
            return (self.head(batch["x"])[:, 0] - batch["x"][:, 0]).square().mean()

    class Unlabelled(Texts):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {"text": item["text"], "x": item["x"]}

    data, model, path = Unlabelled(TEXTS), Regression(), tmp_path / "report.html"
    quiet_trainer(GradientRecorder(tmp_path / "run.tda", projector=Identity())).fit(
        model, loader(data)
    )
    queries = next(iter(loader(data, shuffle=False)))
    report(tmp_path / "run.tda", model, queries, train=data, out=path, progress=False)
    parsed = Parsed(path)
    assert "the queries have no classes as labels." in " ".join(parsed.texts)
    assert [query["text"] for query in parsed.data()["queries"]] != []
    assert all("label" not in query for query in parsed.data()["queries"])


@pytest.mark.parametrize("count", [30, 150])
def test_a_second_peak_is_counted(count):
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(1000 - count, generator=generator).exp()
    high = (5 + 0.4 * torch.randn(count, generator=generator)).exp()
    assert abs(number_set_apart(torch.cat([low, high])) - count) <= 0.1 * count + 3


@pytest.mark.parametrize("seed", range(11))
def test_in_one_peak_hardly_any_sample_is_set_apart(seed):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).exp()
    assert number_set_apart(values) <= 5


def test_equal_values_are_not_set_apart():
    assert number_set_apart(torch.ones(11)) == 0
    assert number_set_apart(torch.zeros(11)) == 0
