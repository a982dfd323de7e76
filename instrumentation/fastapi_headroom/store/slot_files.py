"""The regions of one worker: the files of its slot as long as they can be had, anonymous memory else.

Nothing here raises because of a disk. What could not be written to files waits in memory until ``tend`` finds
space, rights or the directory again, and then moves there with all its counts.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Container
from pathlib import Path

from fastapi_headroom import catalog
from fastapi_headroom.errors import StoreError
from fastapi_headroom.own_io import own_io
from fastapi_headroom.store import exemplars, layout, memory
from fastapi_headroom.store.carry import carry_over
from fastapi_headroom.store.handles import Gauge
from fastapi_headroom.store.memory import Held
from fastapi_headroom.store.moving import move
from fastapi_headroom.store.region import FullError, Region
from fastapi_headroom.store.slot import LOCK_FILE, Slot, SlotTakenError, fingerprint_in, prepare_directory

log = logging.getLogger("fastapi_headroom")
_ADOPT_AFTER_SECONDS = 10.0
_RING_RETRY_SECONDS = 60.0


class SlotFiles:
    """Callers hold the writer's lock."""

    def __init__(self, directory: Path | None, *, group_readable: bool, capacity: int) -> None:
        self.directory = directory
        self.slot: Slot | None = None
        self.degraded = False
        self.regions: dict[str, Region] = {}
        """Where new series go, by stem of the file's name."""
        self.spares: dict[str, Region] = {}
        """Series for which their file had no space."""
        self.degraded_gauge: Gauge | None = None
        """Where it is shown, once there is such a series."""
        self._group_readable, self._capacity = group_readable, capacity
        self._mode = 0o640 if group_readable else 0o600
        self._ring: exemplars.Ring | None = None
        self._ring_retry_at = float("-inf")
        self._ring_complained = False
        self._taken_over = self._succeeded = False
        self._number: int | None = None  # the slot that this worker's labels name: it takes no other one again
        self._opened, self._adopted = time.monotonic(), False
        memory.register(self)

    def open(self) -> None:
        """Claim the lowest free slot and go on from its counters, or degrade."""
        try:
            self._claim(None)
        except (OSError, StoreError, FullError) as error:
            self.degrade(error)

    def region(self, stem: str) -> Region:
        """Return the region of a file, made when it is first asked for. Without space it is one in memory."""
        region = self.regions.get(stem)
        if region is None:
            region = self.regions[stem] = self._create(stem)
        return region

    def spare(self, stem: str) -> Region:
        """Return the region in memory that stands in for a file without space."""
        return self.spares.setdefault(stem, Region.anonymous(self._capacity))

    def exemplar_ring(self) -> exemplars.Ring | None:
        """Return where exemplars go, made when first asked for; None without a file.

        One that cannot be made is no degradation, for all counts are in files; it is tried again in a minute.
        """
        if self._ring is not None or self.directory is None or self.slot is None or not self._taken_over:
            return self._ring
        if time.monotonic() < self._ring_retry_at:
            return None
        path = self.directory / exemplars.file_name(self.slot.number)
        try:
            with own_io():
                self._ring = exemplars.Ring(path, self._mode)
        except OSError as error:
            self._ring_retry_at = time.monotonic() + _RING_RETRY_SECONDS
            if not self._ring_complained:
                self._ring_complained = True
                log.warning(
                    "fastapi-headroom: no exemplars: %s cannot be made (%s); counts are not affected",
                    path,
                    error.strerror,
                )
        return self._ring

    def all(self) -> list[tuple[str, Region]]:
        """Return every region with its stem."""
        return [*self.regions.items(), *self.spares.items()]

    def held(self) -> list[Held]:
        """Return the regions that no other process can see."""
        if not self.degraded:
            return []
        slot = self.slot.number if self.slot is not None else None
        return [Held(stem, slot, region) for stem, region in self.all() if not region.is_file]

    def degrade(self, error: Exception) -> None:
        """Take note that something is counted in memory only, and say why, once until it is over."""
        if self.degraded:
            return
        self._set_degraded(True)
        if isinstance(error, FullError):
            reason = f"a file in {self.directory} is full; look for label values without bounds"
        elif isinstance(error, OSError):
            reason = f"{self.directory}: {error.strerror}; make room there or let this user write"
        else:
            reason = str(error)
        log.error(
            "fastapi-headroom: the app goes on, but what is counted in memory is missing from other processes' scrapes "
            "until the store can be written: %s",
            reason,
        )

    def look_after(self) -> bool:
        """Return whether there is something to ``tend``. Without the lock: a disk that hangs must hold up nobody else.

        About 10 us when all is well; ten seconds after the start it also looks after the slots of dead workers, once.
        """
        directory, slot = self.directory, self.slot
        if directory is None:
            return False
        if not self._adopted and time.monotonic() - self._opened > _ADOPT_AFTER_SECONDS:
            self._adopted = True
            self._adopt_slots_of_other_releases(directory)
        if self.degraded:
            return True
        return slot is not None and not (slot.is_current() and all(r.is_file for r in list(self.regions.values())))

    def tend(self) -> None:
        """Move what is in memory to files, and what lies in deleted ones to new ones, if that can be by now."""
        if self.directory is None:
            return
        slot = self.slot
        self._drop_exemplars()  # they name series by their places in the file, which may change now
        self.degrade(StoreError(f"{self.directory} was deleted or emptied while this worker used it"))
        try:
            if slot is not None and not slot.is_current():
                self._taken_over, self.slot = False, None
                slot.release()
            if self.slot is None or not self._taken_over:
                self._claim(slot.number if slot is not None else self._number)
            for stem in list(self.regions):
                self._move_to_file(stem)
        except (OSError, StoreError, FullError) as error:
            log.debug("fastapi-headroom: %s still cannot be written: %s", self.directory, error)
            if isinstance(error, SlotTakenError):
                self._leave_to_successor(error)
            return
        self._set_degraded(False)
        log.warning("fastapi-headroom: %s can be written again, and has what was counted meanwhile", self.directory)

    def _set_degraded(self, degraded: bool) -> None:
        self.degraded = degraded
        if self.degraded_gauge is not None:
            self.degraded_gauge.set(float(degraded))

    def settle(self) -> None:
        """Let readers tell what is written from now on from what was written before. About 5 us."""
        for region in self.regions.values():
            if region.is_marked:
                region.marks.settle()

    def leave(self, *, copy: bool) -> None:
        """Go on in memory for good, with the values; or without the series, so that handles write to nowhere."""
        for _, region in self.all():
            if copy:
                region.detach(copy=True)
            else:
                region.abandon()
        if not copy:
            self.regions, self.spares = {}, {}
        self._drop_exemplars()
        self.directory, self.slot = None, None

    def _drop_exemplars(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def close(self) -> None:
        """Let go of the slot; live gauges of nobody would stay in an app's own /metrics."""
        slot, directory = self.slot, self.directory
        self.leave(copy=True)
        if slot is not None and directory is not None:
            if self._taken_over and slot.is_current():
                remove_gauges(directory, slot.number)
            slot.release()

    # ------------------------------------------------------------------ files
    def _claim(self, number: int | None) -> None:
        assert self.directory is not None
        if self.slot is None:
            prepare_directory(self.directory, group_readable=self._group_readable)
            self.slot = Slot.claim(self.directory, mode=self._mode, number=number)
            self._number = self.slot.number
        # Files that are ours already: nothing but the lock file was deleted.
        mine = {stem for stem, region in self.regions.items() if region.is_file}
        taken = self._take_over(self.slot, mine)
        self._taken_over = True
        held = {stem: self.regions[stem] for stem in taken if stem in self.regions}
        self.regions.update(taken)  # all of them first: nothing may take the place of a file that has counts
        failed: Exception | None = None
        for stem, before in held.items():
            try:
                self._move(before, stem, same_file=before.shares_file(taken[stem]))
            except (OSError, FullError) as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _leave_to_successor(self, error: SlotTakenError) -> None:
        """Write no more to files whose slot somebody else has, who may have gone on from what they hold."""
        if not self._succeeded:
            self._succeeded = True
            log.error("fastapi-headroom: what this worker counts is in no scrape until it may have it again: %s", error)
        for region in self.regions.values():
            if region.has_file:
                region.detach(copy=False)

    def _adopt_slots_of_other_releases(self, directory: Path) -> None:
        """Rewrite what dead workers of another release left, lest their buckets or help texts mix with ours.

        Not at the start: a slot that is looked after cannot be claimed, and then is when workers claim theirs.
        """
        fingerprint = layout.fingerprint(catalog.ALL)
        for path in directory.glob("slot*.lock"):
            try:
                match = LOCK_FILE.fullmatch(path.name)
                if match is None or fingerprint_in(path) == fingerprint:
                    continue
                slot = Slot.claim(directory, mode=self._mode, number=int(match[1]))
            except (OSError, StoreError):
                continue  # alive, or another user's
            try:
                for region in self._take_over(slot).values():
                    region.close()
            except (OSError, FullError) as error:
                log.debug("fastapi-headroom: %s stays that of another release: %s", path, error)
            finally:
                slot.release()

    def _take_over(self, slot: Slot, mine: Container[str] = ()) -> dict[str, Region]:
        """Return the counters that the slot's last owner left, under our keys; its gauges are gone with it."""
        taken: dict[str, Region] = {}
        try:
            self._open_kept(slot, mine, taken)
        except BaseException:
            for region in taken.values():
                region.close()  # this is tried again every second: what is open must not pile up
            raise
        return taken

    def _open_kept(self, slot: Slot, mine: Container[str], taken: dict[str, Region]) -> None:
        assert self.directory is not None
        remove_gauges(self.directory, slot.number)
        with contextlib.suppress(IsADirectoryError):  # without exemplars all else works
            (self.directory / exemplars.file_name(slot.number)).unlink(missing_ok=True)
        fingerprint = layout.fingerprint(catalog.ALL)
        for stem in ("counter", "histogram", "summary"):
            path = self.directory / layout.file_name(stem, slot.number)
            try:
                region = Region.open(path, self._capacity)
                if slot.fingerprint != fingerprint and stem not in mine:
                    kept = carry_over(region.entries(), stem, catalog.ALL)
                    region.close()
                    region = Region.create(path, self._capacity, self._mode, kept.items())
            except FileNotFoundError:
                continue
            except (layout.TornFileError, FullError) as error:
                aside = path.with_name(path.name + ".torn")
                log.warning("fastapi-headroom: %s starts anew, the old file is kept as %s: %s", path, aside, error)
                path.rename(aside)
                continue
            if stem not in mine:
                region.drop_what_is_no_number()
            taken[stem] = region
        slot.record(fingerprint)

    def _create(self, stem: str) -> Region:
        if self.directory is not None and self.slot is not None and self._taken_over:
            try:
                with own_io():
                    return Region.create(self._path(stem), self._capacity, self._mode)
            except OSError as error:
                self.degrade(error)
        return Region.anonymous(self._capacity)

    def _move_to_file(self, stem: str) -> None:
        before = self.regions[stem]
        if not before.is_file:
            region = Region.prepare(self._path(stem), self._capacity, self._mode)
            self.regions[stem] = region
            try:
                self._move(before, stem)
            finally:
                region.publish()
        spare = self.spares.get(stem)
        if spare is not None:
            move(spare, self.regions[stem])
            del self.spares[stem]

    def _move(self, before: Region, stem: str, *, same_file: bool = False) -> None:
        """Move a region to the one that took its place; what finds no room waits in the spare one."""
        try:
            move(before, self.regions[stem], same_file=same_file)
        except BaseException:
            move(before, self.spare(stem))
            raise
        finally:
            before.close()

    def _path(self, stem: str) -> Path:
        assert self.directory is not None and self.slot is not None
        return self.directory / layout.file_name(stem, self.slot.number)


def remove_gauges(directory: Path, slot: int) -> None:
    """Delete the gauge files of a slot."""
    for mode in layout.GAUGE_MODES:
        (directory / layout.file_name(f"gauge_{mode}", slot)).unlink(missing_ok=True)
