"""What a network says of each validation image, for -e --predictions."""

import csv
import io

from torch import Tensor

from utils.files import write_output
from utils.images.data import VAL, Data
from utils.images.samples import Batch
from utils.machine import distributed, torchrun

HEADER = ("path", "class", "guess", "probability of the guess", "rank of the class")
MOST_CLASSES = 20  # up to which the accuracy of every class is printed
WORST = 5  # classes that are printed where there are more


class Predictions:
    """Gathers a validation's guesses, and tells of them.

    Args:
        data: whose validation it is.
    """

    def __init__(self, data: Data):
        self.data = data
        self.rows: list[tuple[int, int, int, float, int]] = []  # index, class, guess, probability, rank

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add those of a batch, from its logits (N, classes)."""
        targets = batch.targets.to(logits.device)
        guesses = logits.topk(min(5, logits.shape[1])).indices[:, 0]  # as the scores have it, of several that are equal
        probabilities = logits.double().softmax(1).gather(1, guesses[:, None])[:, 0]
        ranks = 1 + (logits > logits.gather(1, targets[:, None])).sum(1)
        ranks += (ranks == 1) & (guesses != targets)
        columns = (targets, guesses, probabilities, ranks)
        self.rows += zip(batch.indices, *(column.tolist() for column in columns), strict=True)

    def report(self, file: str) -> None:
        """Print the accuracy of each class, or of the worst, and write a row for each decoded image; in all processes.

        Raises:
            BadInput: the file can't be written.
        """
        rows, classes = sorted(distributed.gather(self.rows)), self.data.classes
        if torchrun.RANK > 0:
            return
        hits = [[] for _ in classes]
        for _, target, guess, *_ in rows:
            hits[target].append(guess == target)
        accuracy = {label: 100 * sum(hit) / len(hit) for label, hit in enumerate(hits) if hit}
        if len(classes) > MOST_CLASSES:
            accuracy = {label: accuracy[label] for label in sorted(accuracy, key=accuracy.get)[:WORST]}
            print(f"The worst of {len(classes)} classes:")
        for label, top1 in accuracy.items():
            print(f"  {classes[label]}: top-1 {top1:.2f} over {len(hits[label])} images")
        table = csv.writer(stream := io.StringIO(), "excel-tab", lineterminator="\n")
        table.writerow(HEADER)
        for index, target, guess, probability, rank in rows:
            path = self.data.images[VAL].path(index)
            table.writerow([path, classes[target], classes[guess], f"{probability:.4f}", rank])
        write_output("--predictions", file, stream.getvalue().encode(errors="surrogateescape"))
        print(f"{file}: a row for each of {len(rows)} images")
