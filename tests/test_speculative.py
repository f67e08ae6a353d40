"""Speculative decoding as a whole: every mode gives the verifier's output, caches change nothing."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from all_outcomes import all_outcomes
from llada.speculative.decoder import SpeculativeDecoder
from llada.speculative.settings import SpeculativeSettings
from llada.speculative.verifier import Verifier
from speculation import IdsOnly


class TableModel(nn.Module):
    """Random logits that depend on all of the input, as a drafter or as a verifier without cache."""

    def __init__(self, num_tokens, is_causal, seed):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.num_tokens, self.is_causal, self.seed, self.rows = num_tokens, is_causal, seed, {}
        self.config = SimpleNamespace(max_sequence_length=64, max_position_embeddings=64)
        self.config.get_text_config = lambda decoder: self.config

    def row(self, *key):
        if key not in self.rows:
            random = np.random.default_rng([self.seed, *(k + 1 for k in key)])
            self.rows[key] = torch.from_numpy(random.normal(0, 1.5, self.num_tokens))
        return self.rows[key]

    def forward(self, input_ids, past_key_values=None, query_positions=None, use_cache=None):
        assert past_key_values is None
        places = range(input_ids.shape[1]) if query_positions is None else None
        logits = []
        for b, ids in enumerate(input_ids.tolist()):
            wanted = query_positions[b].tolist() if places is None else places
            logits.append([self.row(*ids[: i + 1]) if self.is_causal else self.row(i, *ids) for i in wanted])
        return SimpleNamespace(logits=torch.stack([torch.stack(rows) for rows in logits]))


class TableVerifier(Verifier):
    """A verifier without a cache on a model that is not transformers'."""

    def __init__(self, model, processors):
        self.model, self.processors, self.uses_cache, self.forwards = model, processors, False, 0
        self.device = torch.device("cpu")

    def _run(self, rows, num_logits):
        return self.model(torch.tensor(rows)).logits[:, -num_logits:]


def loop_error(num_tokens, num_answer, monkeypatch, **settings):
    """Total variation between the distribution of whole answers and the verifier's own."""
    settings = SpeculativeSettings(
        max_new_tokens=num_answer, draft_cache=False, **{"temperature": 0.8, **settings}
    )
    verifier = TableModel(num_tokens, True, 1)
    drafter = TableModel(num_tokens + 1, False, 2)
    monkeypatch.setattr("llada.speculative.decoder.Verifier", TableVerifier)
    decoder = SpeculativeDecoder(drafter, verifier, IdsOnly(num_tokens), settings)

    def procedure(draws):
        decoder._draws = lambda record_id: (draws, draws, draws if decoder.rule == "match" else None)
        answer, _ = decoder.decode([0], [0], record_id=0, is_done=lambda answer: answer[-1] == 0)
        return tuple(answer)

    outcomes, targets = all_outcomes(procedure), {}
    for answer in itertools.product(range(num_tokens), repeat=num_answer):
        if 0 in answer:  # 0 ends an answer
            answer = answer[: answer.index(0) + 1]
        probability = 1.0
        for i, token in enumerate(answer):
            scores = decoder.verifier.processors(None, verifier.row(0, *answer[:i])[None])
            probability *= float(scores.softmax(-1)[0, token])
        targets[answer] = probability
    return sum(abs(outcomes.get(x, 0) - targets.get(x, 0)) for x in {*outcomes, *targets}) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"draft": "one_pass", "acceptance": "block", "draft_length": 2},
        {"draft": "one_pass", "acceptance": "token", "draft_length": 2, "top_p": 0.8},
        {"draft": "one_pass", "acceptance": "token", "draft_length": 2, "draft_temperature": 0.5},
        {"draft": "one_pass", "acceptance": "block", "draft_length": 2, "min_confidence": 0.6},
        {"draft": "left_to_right", "acceptance": "block", "draft_length": 2},
        {"draft": "left_to_right", "acceptance": "token", "draft_length": 2, "min_confidence": 0.6},
        {"draft": "left_to_right", "acceptance": "match", "draft_length": 2},
        {"draft": "confidence", "draft_length": 2},
        {"draft": "one_pass", "num_chains": 2, "draft_length": 2},
        {"draft": "left_to_right", "num_chains": 2, "draft_length": 1},
        {"draft": "one_pass", "adaptive_length": True, "draft_length": 3},
    ],
    ids=str,
)  # fmt: skip
def test_whole_answers_have_the_verifiers_distribution(settings, monkeypatch):
    is_matched = settings.get("acceptance") == "match" or settings["draft"] == "confidence"  # many outcomes
    for num_tokens, num_answer in [(2, 3)] if is_matched else [(3, 3), (2, 4)]:
        assert loop_error(num_tokens, num_answer, monkeypatch, **settings) < 1e-12


def test_ratios_on_drafts_by_confidence_would_be_wrong(monkeypatch):
    monkeypatch.setattr(SpeculativeSettings, "rule", lambda settings, bridge: "token")
    assert loop_error(3, 3, monkeypatch, draft="confidence", draft_length=2) > 1e-3
