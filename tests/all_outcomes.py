"""The exact distribution of a random procedure: every outcome of every draw, with its probability."""

from collections import defaultdict


class ScriptedDraws:
    """MaskedCopies that follow a path of outcomes, then take the first possible one, and note the others."""

    def __init__(self, path):
        self.path, self.taken, self.probability, self.others = path, [], 1.0, []

    def _outcome(self, probabilities):
        possible = [i for i, probability in enumerate(probabilities) if probability > 0]
        if len(self.taken) < len(self.path):
            outcome = self.path[len(self.taken)]
        else:
            outcome = possible[0]
            self.others += [(*self.taken, other) for other in possible[1:]]
        self.taken.append(outcome)
        self.probability *= probabilities[outcome]
        return outcome

    def accept(self, probability):
        return self._outcome([probability, 1 - probability]) == 0

    def choose(self, weights):
        return [self._outcome((row / row.sum()).tolist()) for row in weights]

    def choose_at(self, positions, weights):
        return self.choose(weights)


def all_outcomes(procedure):
    """{outcome: probability} of `procedure(draws)`, by running it once for each path of draws."""
    total, paths = defaultdict(float), [()]
    while paths:
        draws = ScriptedDraws(paths.pop())
        total[procedure(draws)] += draws.probability
        paths += draws.others
    return dict(total)
