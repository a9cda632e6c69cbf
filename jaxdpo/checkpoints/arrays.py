"""The arrays of a checkpoint on disk: the one module that knows orbax and tensorstore.

Orbax writes the shards of all processes together and restores them onto another mesh; tensorstore,
on which it is built, reads parts of an array, which orbax does not offer.
"""

import errno
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxdpo.utils.tree import named_leaves, path_name

Tree = dict[str, Any]

PIECE_BYTES = 2**22
"""Parameters are saved in pieces of at most 4 MiB, each of one layer, so that open_arrays can read
a layer without the others."""


def background_saver() -> ocp.AsyncCheckpointer:
    """Saves in the background: copies to host memory at once, writes from a thread of its own."""
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())


def save_state(saver: ocp.AsyncCheckpointer, folder: Path, state: Any) -> None:
    """Start to save a state; `saver.wait_until_finished()` waits for it."""

    def divided(path: tuple, _: Any) -> ocp.SaveArgs:
        names = path_name(path).split("/")
        if names[0] != "params":
            return ocp.SaveArgs()
        layer_axis = (0,) if "layers" in names else ()
        return ocp.SaveArgs(chunk_byte_size=PIECE_BYTES, shard_axes=layer_axis)

    save_args = jax.tree_util.tree_map_with_path(divided, state)
    # Orbax copies to the host implicitly, which the training loop forbids.
    with jax.transfer_guard("allow"):
        saver.save(folder / "state", args=ocp.args.StandardSave(state, save_args))


def restore_state(saver: ocp.AsyncCheckpointer, folder: Path, abstract_state: Any) -> Any:
    """Restore a state onto devices, to the bits that were saved.

    Args:
        abstract_state: like the saved state, of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        ValueError: names, shapes or types differ from the saved ones.
    """
    saved, wanted = shapes_of(_metadata(saver, folder)), shapes_of(abstract_state)
    wrong = []
    for path in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(path, "not at all"), wanted.get(path, "not at all")
        if old != new:
            wrong.append(f"\n  {path}: saved {old}, wanted {new}")
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: holds another state than this run needs. Use another run_dir."
            + "".join(wrong)
        )
    return saver.restore(folder / "state", args=ocp.args.StandardRestore(abstract_state))


def shapes_of(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array of a tree, as text, by its path."""
    shapes = {}
    for name, leaf in named_leaves(tree).items():
        shapes[name] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return shapes


def check_saved(folder: Path, shapes: dict[str, str]) -> None:
    """Prove that a state that was just saved can be restored.

    Reads names, shapes and types of all arrays and the list of their pieces, and from arrays in
    small pieces the last one: kilobytes to a few megabytes an array, however large the state is.

    Args:
        shapes: of the state, as `shapes_of` gives them.

    Raises:
        OSError: with the first array that cannot be restored.
    """
    try:
        names = [name.replace("/", ".") for name in shapes]
        stores = _open_all(folder, names)
        # All at once: each answer may be a round trip to a disk of the network.
        keys = [store.kvstore.list() for store in stores]  # type: ignore[union-attr]
        for name, store, listed in zip(names, stores, keys, strict=True):
            _check_pieces(name, store, len(listed.result()) - 1)  # one key is the array's metadata
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = shapes_of(_metadata(reader, folder))
        if found != shapes:
            different = sorted({*found.items()} ^ {*shapes.items()})
            raise ValueError(f"it holds other arrays than were saved: {different[0]}")
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise OSError(
            errno.EIO,
            f"a checkpoint was written, but cannot be read back ({reason}), so it is not kept",
            str(folder),
        ) from error


def _check_pieces(name: str, store: ts.TensorStore, num_found: int) -> None:
    """Check that an array has all of its pieces, and read the last one if it is small.

    Raises:
        ValueError: pieces are missing, or the last one cannot be read.
    """
    piece: tuple[Any, ...] = store.chunk_layout.write_chunk.shape or ()  # None for a scalar
    num_pieces = 1
    last = []
    for size, step in zip(store.shape, piece, strict=True):
        count = -(-size // step)
        num_pieces *= count
        last.append(slice((count - 1) * step, size))
    if num_found != num_pieces:
        raise ValueError(f"{name} has {num_found} of its {num_pieces} pieces")
    if math.prod(piece) * store.dtype.numpy_dtype.itemsize <= PIECE_BYTES:
        store[tuple(last)].read().result()


def _metadata(reader: ocp.Checkpointer, folder: Path) -> Tree:
    """Names, shapes and types of a saved state, without its values."""
    metadata = reader.metadata(folder / "state").item_metadata
    assert metadata is not None, f"{folder} was saved without metadata"
    return metadata.tree


def read_arrays(folder: Path, name: str) -> Tree:
    """One entry of a saved state, such as "params", in host memory: nested dict of numpy arrays."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = {name: _metadata(reader, folder)[name]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        args = ocp.args.PyTreeRestore(saved, as_numpy, partial_restore=True)
        return reader.restore(folder / "state", args=args)[name]


def open_arrays(folder: Path, name: str) -> Tree:
    """As read_arrays, but nothing of an array is read before it is indexed."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = _metadata(reader, folder)[name]
    return jax.tree.map(lambda leaf: _open(folder, leaf.name), saved)


def _open(folder: Path, name: str) -> ts.TensorStore:
    """An array of a saved state, by its name there: params.layers.attn.q."""
    (array,) = _open_all(folder, [name])
    return array


def _open_all(folder: Path, names: list[str]) -> list[ts.TensorStore]:
    """Arrays of a saved state, opened together."""
    files = {"driver": "file", "path": f"{folder / 'state'}/"}
    context, opening = ts.Context(), []
    for name in names:
        arrays = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": arrays}
        spec["fill_missing_data_reads"] = False  # otherwise missing pieces would read as zeros
        opening.append(ts.open(spec, read=True, context=context))
    return [future.result() for future in opening]


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of arrays of such shapes."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
