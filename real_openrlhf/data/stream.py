"""An endless, resumable stream of prompts, reshuffled every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from real_openrlhf.data.dataset import content_hash
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import DataError


class StreamExhausted(Exception):
    """The episodes are used up: fewer prompts are left than were asked for."""


class PromptStream:
    """Every prompt once per epoch, in an order that depends only on (seed, epoch).

    prompts: not empty. num_episodes: number of epochs; None: endless.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True, num_episodes: int | None = None
    ) -> None:
        if not prompts:
            raise DataError("there are no prompts to draw from")
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        if num_episodes is not None and num_episodes < 1:
            raise ValueError(f"--train.num_episodes must be at least 1, got {num_episodes}")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._num_episodes = num_episodes
        self._sha256 = content_hash(self._prompts)
        self._epoch = 0
        self._position = 0
        self._order = self._epoch_order(0)
        # Indices of prompts that were put back; they are taken first.
        self._returned: list[int] = []
        self._index_of = {prompt.row: i for i, prompt in enumerate(self._prompts)}

    @property
    def epoch(self) -> int:
        """The epoch of the next prompt, from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """The next prompt's index in its epoch, 0 to len(prompts) - 1."""
        return self._position

    @property
    def remaining(self) -> int | None:
        """How many prompts are left in all episodes; None without a limit."""
        if self._num_episodes is None:
            return None
        ahead = max(0, (self._num_episodes - self._epoch) * len(self._prompts) - self._position)
        return ahead + len(self._returned)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; they may cross into the next epoch.

        Raises StreamExhausted, and takes nothing, when fewer than n remain; `remaining` says how many do.
        """
        if n < 0:
            raise ValueError(f"cannot take {n} prompts")
        if self.remaining is not None and n > self.remaining:
            raise StreamExhausted(
                f"{n} prompts are wanted, but {self.remaining} remain of --train.num_episodes {self._num_episodes} "
                f"over {len(self._prompts)} prompts"
            )
        taken = [self._prompts[i] for i in self._returned[:n]]
        self._returned = self._returned[n:]
        while len(taken) < n:
            here = self._order[self._position : self._position + n - len(taken)]
            taken.extend(self._prompts[i] for i in here)
            self._position += len(here)
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order(self._epoch)
        return taken

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Put back prompts that were taken but not used: they come first at the next `take`."""
        indices = []
        for prompt in prompts:
            index = self._index_of.get(prompt.row)
            if index is None or self._prompts[index].token_ids != prompt.token_ids:
                raise ValueError(
                    f"a prompt of row {prompt.row} does not come from this stream and cannot go back to it"
                )
            indices.append(index)
        self._returned += indices

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, as ints and strings."""
        return {
            "returned": list(self._returned),
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "data_sha256": self._sha256,
            "order_sha256": self._order_hash(self._order),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was saved.

        num_episodes may differ; other data, another seed or another shuffling raise DataError.
        """
        if state["data_sha256"] != self._sha256:
            raise DataError(
                "the checkpoint was made with other prompts or labels than the data set now loaded (sha256 "
                f"{state['data_sha256'][:12]} against {self._sha256[:12]}); check the data set, its template, the "
                "tokenizer, and --data.max_samples with --train.seed"
            )
        for key, now in (("seed", self._seed), ("shuffle", self._shuffle)):
            if state[key] != now:
                raise DataError(f"the checkpoint drew prompts with {key} {state[key]}, this run has {key} {now}")
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self._prompts):
            raise DataError(f"the checkpoint is at epoch {epoch}, prompt {position} of {len(self._prompts)}")
        returned = [int(i) for i in state["returned"]]
        wrong = [i for i in returned if not 0 <= i < len(self._prompts)]
        if wrong:
            raise DataError(f"the checkpoint holds back prompt {wrong[0]} of {len(self._prompts)}")
        order = self._epoch_order(epoch)
        if self._order_hash(order) != state["order_sha256"]:
            # NumPy does not promise the same permutation in every release.
            raise DataError("this numpy shuffles differently from the one that made the checkpoint; use that version")
        self._epoch, self._position, self._order = epoch, position, order
        self._returned = returned

    def _epoch_order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        return [int(i) for i in generator.permutation(len(self._prompts))]

    @staticmethod
    def _order_hash(order: list[int]) -> str:
        return hashlib.sha256(np.asarray(order, dtype="<i8").tobytes()).hexdigest()
