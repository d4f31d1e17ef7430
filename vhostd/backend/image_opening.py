"""A pmem device's image, opened anew or as a predecessor had it open.

A predecessor's open file is worth more than the file: it has the lock, and the kernel tells each
open file of a write error once. Must not know VMMs or what the image is for.
"""

from __future__ import annotations

import os
from pathlib import Path

from vhostd import _native
from vhostd.backend.left import Left
from vhostd.devices.pmem import PmemOptions
from vhostd.images.image_file import ImageUnusable, OpenImage, adopt_image, open_image


def open_for(options: PmemOptions, left: Left | None) -> OpenImage:
    """The image, open and locked; blocks as long as storage likes.

    Raises:
        ImageUnusable: it can't be served.
    """
    path = Path(options.file)
    if left is not None and (file := left.take("image")) is not None:
        return adopt_image(path, file, left.take("witness"))
    if options.refusal is not None:
        raise ImageUnusable(f"{options.id}: size: {options.refusal}")
    return open_image(path, options.size, readonly=options.readonly)


def refuse_memory(opened: OpenImage, owner: str | None) -> None:
    """See to it that an image is not mapped as guest memory; owner: of what VM it is, if it is.

    Raises:
        ImageUnusable: it is.
    """
    if owner is not None:
        raise ImageUnusable(
            f"{opened.path}: is mapped as guest memory of VM {owner!r}, whose VMM named it before"
            " it was a disk; restart that VM"
        )


def native_image(opened: OpenImage, left: Left | None) -> _native.Image:
    """The native side of an open image, with what a predecessor knew of its syncs.

    Raises:
        ImageUnusable: no memory or descriptor for it.
    """
    shared = None if left is None else left.take("image-state")
    try:
        return _native.Image(
            opened.file.fileno(),
            opened.witness.fileno(),
            -1 if shared is None else shared.fileno(),
        )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ImageUnusable(f"{opened.path}: can't be served: {reason}") from error
