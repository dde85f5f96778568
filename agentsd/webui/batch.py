"""Passes of a host that announces batches only (SD.Next): recognised by the calls of its U-Net.

From the announcement of a batch to its end a hook watches the U-Nets. At the first call of a pass the patch is put on;
there the host's own changes to the model are complete. It comes off when another pass or the batch ends.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..app.last_run import STATUS
from ..apply import get_patch
from ..hosts import read_size
from ..words import error_of_ours
from . import compat, session


class Batch:
    """A batch of images that the host is making by the processing object `p`."""

    def __init__(self, p: Any) -> None:
        self.p, self.thread = p, threading.get_ident()
        self._pass: session.Pass | None = None  # the one under way
        self._end_pass, self._unwatch = ExitStack(), ExitStack()
        self._watched: set[nn.Module] = set()

    def watch(self) -> None:
        """Watch the loaded U-Nets."""
        for unet in set(compat.HOST.unets()) - self._watched:
            self._watched.add(unet)
            hook = unet.register_forward_pre_hook(self._before_call, with_kwargs=True, prepend=True)
            self._unwatch.callback(hook.remove)

    def close(self) -> None:
        """End the pass under way and stop watching."""
        if self in _batches:
            _batches.remove(self)
        self._unwatch.close()
        self._end_pass.close()

    def _before_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _batches[-1:] != [self]:
            return  # an image is being made in the middle of this one
        patch = get_patch(unet)
        try:
            self._follow(unet, read_size(args, kwargs))
        except Exception as error:  # a bug of ours must never cost the user an image
            STATUS.fail(error_of_ours(error))
            self.close()
        if get_patch(unet) not in (None, patch):
            get_patch(unet).begin_call(unet, args, kwargs)

    def _follow(self, unet: nn.Module, size: tuple[int, int] | None) -> None:
        hires = compat.HOST.is_hires(self.p)
        if self._pass is None or hires is not self._pass.hires:
            self._end_pass.close()
            self.watch()  # a refiner may have been loaded since
            self._pass = self._end_pass.enter_context(session.around_pass(self.p, hires, size))
        self._pass.next_call(unet)


# Batches under way, nested if a script makes an image in the middle of another one
_batches: list[Batch] = []


def begin(p: Any) -> None:
    """Watch the next batch of `p`, where the host does not announce passes."""
    if not compat.HOST.announces_passes:
        end(p)
        if session.generation_of(p) is not None or _batches:
            _batches.append(batch := Batch(p))  # before it watches: what is listed is closed, whatever happens
            batch.watch()


def end(p: Any) -> None:
    """End the batch of `p` and those begun in it, and whatever other threads have lost."""
    here = threading.get_ident()
    first = next((i for i, batch in enumerate(_batches) if batch.p is p or batch.thread != here), len(_batches))
    for batch in reversed(_batches[first:]):
        batch.close()


def end_all(p: Any) -> None:
    """Called by such a host when the generation of `p` has ended, in whatever way."""
    end(p)
    session.finish(p)
