"""Training of networks between two groups of images that are not paired, against critics."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute.device import adamw, to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.domains import Domain
from meddiff_steps.imaging.variants import draw_variant
from meddiff_steps.models.latent_statistics import measure_standardisation
from meddiff_steps.models.unpaired import OTHER, Critics, Side, Unpaired
from meddiff_steps.training.loop import batch_rows, clip_gradients
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Held-out images of either group that a validation looks at, and training images that mean and spread are taken of.
VALIDATION_SCANS, MEASURED_SCANS = 16, 256
#: Steps between two penalties of the critics, each so many times as large (Karras et al. 2020, "lazy").
PENALTY_EVERY = 8


class UnpairedTask:
    """Guesses and diffusions that critics take for real, and that end where they began when they go there and back
    (Özbey et al. 2023; the critics' loss is that of Goodfellow et al. 2014, not saturating, as Xiao et al. 2022 have
    it).

    Batches of the two groups are drawn each on its own.

    Parameters
    ----------
    settings, variants
        The study's section, and `variants`: mirrored and shifted images; grey values stay.
    domains
        The two groups.
    root
        The study's seed, and what the networks are for.
    """

    def __init__(
        self,
        settings: config.Unpaired,
        variants: config.Variants,
        domains: Mapping[Side, Domain],
        root: str,
        fabric: Fabric,
    ) -> None:
        self.settings, self.domains, self.fabric, self.root = settings, domains, fabric, root
        self.variants = variants.model_copy(update={"max_contrast": 0.0})
        self.micro = MicroBatch(fabric)
        spatial = domains["a"].shards.shape(domains["a"].columns[0])[1:]
        torch.manual_seed(int(step_generator(root, "weights", 0).integers(2**31)))
        self.model = model = Unpaired(settings, spatial, {side: len(each.columns) for side, each in domains.items()})
        critics = Critics(settings, model)
        for side, domain in domains.items():
            self._standardise(side, domain)
        for part in (model, critics):
            to_channels_last(part, len(spatial))
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        fabric.to_device(critics)
        self.critics, stepper = fabric.setup(critics, adamw(critics.parameters(), settings.critic_rate, fabric))
        self.steppers = list(self.optimisers.values())
        self.optimisers["critics"] = stepper
        self.modules: dict[str, nn.Module] = {
            "model": model,
            "average": fabric.to_device(average),
            "critics": critics,
        }
        #: What `compilation.speed_up` may compile; critics are left out, whose gradient is differentiated.
        self.costly = list(model.costly)

    def _standardise(self, side: Side, domain: Domain) -> None:
        """Mean of a group's images at every place and one spread about it, and their grey values."""
        rows = domain.rows[:: max(1, len(domain.rows) // MEASURED_SCANS)][:MEASURED_SCANS]
        net = self.model.diffusion(side)

        def images() -> Iterator[Tensor]:
            return (torch.from_numpy(domain.images([row]) * 2.0 - 1.0) for row in rows)

        self.model.measure_tone(side, images())
        found = measure_standardisation(net.in_blocks(each)[0].numpy() for each in images())
        net.offset.copy_(torch.from_numpy(found.offset))
        net.scale.fill_(float(found.scale))

    def rows(self, side: Side, step: int) -> np.ndarray:
        """Of the group's images in the batch of a step."""
        domain = self.domains[side]
        return domain.rows[
            batch_rows(f"{self.root}/{side}", step, self.settings.optimiser.batch_size, len(domain.rows))
        ]

    def _images(self, side: Side, rows: np.ndarray, generator: np.random.Generator | None) -> Tensor:
        """From -1 to 1; varied where a generator is given."""
        images = self.domains[side].images(rows)
        if generator is not None:
            changes = [draw_variant(self.variants, images.ndim - 2, generator) for _ in rows]
            images = np.stack([change(image) for change, image in zip(changes, images, strict=True)])
        return to_device((images * 2.0 - 1.0).astype(np.float32), self.fabric)

    def _noise(self, side: Side, count: int, generator: np.random.Generator) -> Tensor:
        shape = self.model.diffusion(side).blocks_shape
        return to_device(generator.standard_normal((count, *shape), dtype=np.float32), self.fabric)

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, model, size = self.settings, self.model, self.settings.optimiser.batch_size
        generator = step_generator(self.root, "batch/0", step)
        images = {side: self._images(side, self.rows(side, step), generator) for side in OTHER}
        uniform = (generator.permutation(size) + generator.random(size)) / size
        level = to_device((uniform * model.steps.count).astype(np.int64), self.fabric)
        real, states, posterior, blocks = {}, {}, {}, {}
        for side in OTHER:
            blocks[side] = model.standardised(side, images[side])
            noise, more, posterior[side] = (self._noise(side, size, generator) for _ in range(3))
            real[side], states[side] = model.steps.noisier(level, blocks[side], noise, more)
        judging: list[tuple[str, Side]] = [(kind, side) for kind in ("guess", "clean") for side in OTHER]
        made: dict[tuple[str, Side], list[Tensor]] = {each: [] for each in judging}

        def shown(kind: str, side: Side, image: Tensor, part: slice) -> Tensor:
            """What a critic sees of an image, a guess or a next state."""
            return image if kind == "guess" else torch.cat([image, states[side][part]], 1)

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            found = self.net(
                {side: each[part] for side, each in images.items()},
                {side: each[part] for side, each in states.items()},
                level[part],
            )
            named = dict.fromkeys(("train/fooling", "train/cycle", "train/clean"), torch.zeros((), device=level.device))
            for side in OTHER:
                guess = model.standardised(side, found["guess"][side])
                clean = found["clean"][side]
                following = model.steps.cleaner(level[part], states[side][part], clean, posterior[side][part])
                for kind, image in (("guess", guess), ("clean", following)):
                    seen = shown(kind, side, image, part)
                    made[kind, side].append(seen.detach())
                    judged = self.critics(kind, side, seen, level[part])
                    named["train/fooling"] = named["train/fooling"] + functional.softplus(-judged).mean()
                named["train/cycle"] = named["train/cycle"] + cycle_error(images[side][part], found["back"][side])
                restored = model.images(side, clean)
                named["train/clean"] = named["train/clean"] + cycle_error(images[side][part], restored)
            cycles = named["train/cycle"] + named["train/clean"]
            return named["train/fooling"] + settings.cycle_weight * cycles, named

        self.critics.requires_grad_(False)
        found = self.micro.gradients(self.net, size, losses)
        clip_gradients(self.net, settings.optimiser, step, self.fabric)
        for stepper in self.steppers:
            stepper.step()
        self.critics.requires_grad_(True)
        # A batch that did not fit was begun anew in smaller parts: the last `size` rows are those of this step.
        drawn = {each: torch.cat(parts)[-size:] for each, parts in made.items()}
        penalised = settings.critic_penalty > 0 and step % PENALTY_EVERY == 0

        def judgement(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            total, penalty = torch.zeros((), device=level.device), torch.zeros((), device=level.device)
            for kind, side in judging:
                true = shown(kind, side, (blocks if kind == "guess" else real)[side][part], part)
                judged = self.critics(kind, side, true, level[part])
                fooled = self.critics(kind, side, drawn[kind, side][part], level[part])
                total = total + functional.softplus(-judged).mean() + functional.softplus(fooled).mean()
                if penalised:
                    # In full precision and by the network itself: Fabric's lets itself be differentiated by its own
                    # backward alone
                    watched = true.detach().requires_grad_()
                    judged = self.modules["critics"](kind, side, watched, level[part])
                    (gradient,) = torch.autograd.grad(judged.sum(), watched, create_graph=True)
                    penalty = penalty + gradient.square().flatten(1).sum(1).mean() / judged[0].numel()
            loss = total + PENALTY_EVERY * settings.critic_penalty / 2 * penalty
            return loss, {"train/critics": total}

        found |= self.micro.gradients(self.critics, size, judgement)
        clip_gradients(self.critics, settings.optimiser, step, self.fabric)
        self.optimisers["critics"].step()
        return found

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Of held-out images of both groups, by averaged weights: `val/cycle`, the mean absolute error after the guess
        of a guess, and `val/clean`, of what states with fixed noise are taken for.  Whether what is drawn looks like
        the other group neither says.
        """
        average = self.modules["average"]
        assert isinstance(average, Unpaired)
        found: dict[str, list[float]] = {"val/cycle": [], "val/clean": []}  # of each group
        for side, other in OTHER.items():
            rows = self.domains[side].held_out[:VALIDATION_SCANS]
            if not len(rows):
                continue
            generator = step_generator(self.root, f"validation/{side}", 0)
            images = self._images(side, rows, None)
            level = to_device(np.arange(len(rows)) % average.steps.count, self.fabric)
            noise, more = (self._noise(side, len(rows), generator) for _ in range(2))
            cycle = clean = 0.0
            for part in self.micro.parts(len(rows), self.settings.optimiser.batch_size):
                real, at = images[part], level[part]
                with self.fabric.autocast():
                    _, states = average.steps.noisier(at, average.standardised(side, real), noise[part], more[part])
                    guess = average.guess(other, real)
                    cycle += len(real) * float(cycle_error(real, average.guess(side, guess)))
                    made = average.images(side, average.clean(side, guess, states, at))
                    clean += len(real) * float(cycle_error(real, made))
            found["val/cycle"].append(cycle / len(rows))
            found["val/clean"].append(clean / len(rows))
        return {name: float(np.mean(values)) for name, values in found.items() if values}


def cycle_error(images: Tensor, returned: Tensor) -> Tensor:
    """Mean absolute error of images that went to the other group and back; 0 for exact inverses (Zhu et al. 2017)."""
    return (returned - images).abs().mean()
