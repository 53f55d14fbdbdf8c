"""The η that a dose comes to, and the proposal."""

from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from repulsion import Repulsion, repel, vendi_score
from repulsion.solvers import gram_matrix


def tokens(seed=0):
    torch.manual_seed(seed)
    return torch.randn(1, 5, 24, dtype=torch.float64) + 0.2 * torch.randn(4, 5, 24, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9])
def test_the_scale_pushes_as_far_as_the_dose(iterations, diversity):
    batch = tokens()
    dose = Repulsion(diversity=diversity, iterations=iterations)
    scale = tune.equivalent_scale(gram_matrix(batch.flatten(1)[None]), dose)
    by_dose, by_scale = (vendi_score(repel(batch, s, iterations, diversity=d).flatten(1)).log().item()
                         for s, d in ((None, diversity), (scale, None)))
    assert by_scale == pytest.approx(by_dose, rel=2e-3)  # η is found to one in a thousand


def test_the_scale_is_a_squared_length():
    gram = gram_matrix(tokens().flatten(1)[None])
    one, hundred = (tune.equivalent_scale(factor * gram, Repulsion(diversity=0.3)) for factor in (1, 100))
    assert hundred == pytest.approx(100 * one, rel=2e-3)


def test_where_nothing_moves_there_is_no_scale():
    assert tune.equivalent_scale(torch.ones(1, 3, 3, dtype=torch.float64), Repulsion(diversity=0.3)) is None


@pytest.mark.parametrize("branches,pushes", [("all", 2), ("conditional", 1)])
def test_every_push_is_noted_and_is_the_one_that_is_made(branches, pushes):
    plain = Repulsion(diversity=0.4, iterations=2, branches=branches)
    noting = tune.Measured(**{name: getattr(plain, name) for name in Repulsion.__dataclass_fields__})
    two = torch.cat([tokens(1), tokens(2)])
    assert torch.equal(noting.streams("attention", two, two, 2)[0], plain.streams("attention", two, two, 2)[0])
    assert len(noting.scales) == pushes and replace(noting, diversity=0.5).scales is noting.scales


def test_the_proposal_is_the_largest_gain_that_keeps_the_prompt():
    base = {"vendi": 2.0, "adherence": 0.98}
    doses = {0.1: {"vendi": 2.2, "adherence": 0.98}, 0.5: {"vendi": 2.6, "adherence": 0.955},
             0.9: {"vendi": 3.0, "adherence": 0.94}}
    assert tune.propose(doses, base) == 0.5
    assert tune.propose(doses, {"vendi": 2.0, "adherence": None}) is None


def test_the_program_proposes_and_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "DOSES", (0.5,))
    monkeypatch.setattr("sys.argv", ["tune", "--prompts", "a circle", "--seeds", "1", "--images", "2", "--steps", "1",
                                     "--out", str(tmp_path / "out")])
    assert tune.main() == 0
    printed = capsys.readouterr().out
    assert "| base |" in printed and "| 0.5 |" in printed
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["base.png", "diversity-0.5.png"]
    monkeypatch.setattr("sys.argv", ["tune", "--blocks", "0-99"])
    assert tune.main() == 2 and "blocks end at 7" in capsys.readouterr().err
