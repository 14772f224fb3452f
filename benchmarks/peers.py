"""Methods of other libraries that send a state between two processes, used as they document it.

Every method is the fastest of the usual ones of its library on one machine: if it can share memory,
it does. Its docstring says what to know in addition to its time.

Linux only, as some use ``/dev/shm``. A maker raises ImportError, with the reason, where its library
is not installed or cannot run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import io
import json
import logging
import os
import pickle
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from common import HOST, Link, Method, State, bytes_of, finished

Transfer = Callable[[], Any]

SHARED_MEMORY = "/dev/shm"
RAY_STORE = 3 * 2**30
# Their names share an index of 256 KiB.
TENSORIZER_TENSORS = 2000
PIECE = 2**18
TIMEOUT = timedelta(seconds=60)


def _specs(state: State) -> list[tuple[str, str, list[int]]]:
    """Return the names, dtypes and shapes with which a receiver makes tensors of bytes."""
    return [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in state.items()
    ]


def streaming() -> Method:
    """torch.distributed's private pair for streams, over blocking socket files.

    The receiver reads each storage as bytes and shares their memory. The rest of the object is a
    pickle, loaded with ``weights_only``.
    """
    serialization = importlib.import_module("torch.distributed._serialization")

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        with link.socket() as sock, sock.makefile("wb") as file:

            def transfer() -> None:
                serialization._streaming_save(state, file)
                file.flush()

            yield transfer

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        with link.socket() as sock, sock.makefile("rb") as file:
            yield lambda: serialization._streaming_load(file)

    return Method(send, receive)


def _over_asyncio(dump: Callable[[State], Any], load: Callable[[bytes], State]) -> Method:
    """A pair that makes bytes of a state and a state of bytes, which asyncio's streams carry."""

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        async def transfer() -> None:
            data = memoryview(dump(state))
            writer.write(len(data).to_bytes(8, "little"))
            # In one piece, the bytes that are not sent at once would be copied to the transport's
            # buffer.
            for start in range(0, len(data), PIECE):
                writer.write(data[start : start + PIECE])
                await writer.drain()
            await finished(writer)

        with asyncio.Runner() as runner:
            _, writer = runner.run(asyncio.open_connection(sock=link.socket()))
            yield lambda: runner.run(transfer())

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        async def transfer() -> State:
            size = int.from_bytes(await reader.readexactly(8), "little")
            return load(await reader.readexactly(size))

        with asyncio.Runner() as runner:
            reader, writer = runner.run(asyncio.open_connection(sock=link.socket()))
            yield lambda: runner.run(transfer())
            runner.run(finished(writer))

    return Method(send, receive)


def torch_save() -> Method:
    """``torch.save`` and ``torch.load`` on bytes in memory; a pickle, with ``weights_only``."""

    def dump(state: State) -> memoryview:
        file = io.BytesIO()
        torch.save(state, file)
        return file.getbuffer()

    return _over_asyncio(dump, lambda data: torch.load(io.BytesIO(data), weights_only=True))


def safetensors() -> Method:
    """The safetensors package's ``save`` and ``load``: a second copy of the state at both ends.

    No pickle. The result is in the order of safetensors, not in that of the state.
    """
    module = importlib.import_module("safetensors.torch")
    return _over_asyncio(module.save, module.load)


def torchft_http() -> Method:
    """The HTTPTransport of torchft, as its Manager makes it: ``_streaming_save`` over HTTP.

    The sender only offers the state; a thread of its server sends it. The rest of the object is a
    pickle, loaded without ``weights_only``.
    """
    module = importlib.import_module("torchft.checkpointing.http_transport")

    @contextlib.contextmanager
    def transport() -> Iterator[Any]:
        made = module.HTTPTransport(timeout=TIMEOUT, num_chunks=0)
        yield made
        made.disallow_checkpoint()
        made.shutdown()

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        with transport() as made:
            link.tell(made.metadata())
            yield lambda: made.send_checkpoint([1], step=0, state_dict=state, timeout=TIMEOUT)
            link.meet()

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        with transport() as made:
            address = link.hear()
            yield lambda: made.recv_checkpoint(0, metadata=address, step=0, timeout=TIMEOUT)
            link.meet()

    return Method(send, receive)


def gloo() -> Method:
    """torch.distributed's ``isend`` and ``irecv`` on gloo, into tensors that the receiver makes.

    Names, dtypes and shapes are sent first, as a pickle. The group is made before the clock starts.
    """
    dist: Any = importlib.import_module("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        raise ImportError("this torch has no gloo")

    @contextlib.contextmanager
    def group(store: Any, rank: int) -> Iterator[None]:
        # Otherwise gloo takes the interface to which the host name resolves.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        yield
        dist.destroy_process_group()

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        def transfer() -> None:
            dist.send_object_list([_specs(state)], dst=1)
            for work in [dist.isend(tensor, dst=1) for tensor in state.values()]:
                work.wait()

        store = dist.TCPStore(HOST, 0, 2, is_master=True, wait_for_workers=False)
        link.tell(store.port)
        with group(store, 0):
            yield transfer
            link.meet()

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        def transfer() -> State:
            objects: list[Any] = [None]
            dist.recv_object_list(objects, src=0)
            state = {
                name: torch.empty(shape, dtype=getattr(torch, dtype))
                for name, dtype, shape in objects[0]
            }
            for work in [dist.irecv(tensor, src=0) for tensor in state.values()]:
                work.wait()
            return state

        with group(dist.TCPStore(HOST, link.hear(), 2, is_master=False), 1):
            yield transfer
            link.meet()

    return Method(send, receive)


def pyzmq() -> Method:
    """One multipart message: a header in JSON, and a frame for each tensor, without copies.

    The receiver's tensors share the memory of the frames, and can be written to. Small frames stay
    where libzmq has received them, so their tensors may be at any address, not aligned.
    """
    zmq = importlib.import_module("zmq")
    zmq_asyncio = importlib.import_module("zmq.asyncio")

    @contextlib.contextmanager
    def socket(kind: int) -> Iterator[tuple[Any, asyncio.Runner]]:
        with (
            asyncio.Runner() as runner,
            zmq_asyncio.Context() as context,
            context.socket(kind) as sock,
        ):
            yield sock, runner

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        async def transfer() -> None:
            header = json.dumps(_specs(state)).encode()
            await sock.send_multipart([header, *map(bytes_of, state.values())], copy=False)

        async def greet() -> None:
            await sock.send(b"")

        with socket(zmq.PUSH) as (sock, runner):
            sock.connect(link.hear())
            runner.run(greet())
            yield lambda: runner.run(transfer())
            link.meet()

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        async def transfer() -> State:
            header, *frames = await sock.recv_multipart(copy=False)
            specs = json.loads(header.bytes)
            return {
                name: torch.frombuffer(frame, dtype=getattr(torch, dtype)).reshape(shape)
                for (name, dtype, shape), frame in zip(specs, frames, strict=True)
            }

        async def greet() -> None:
            await sock.recv()

        with socket(zmq.PULL) as (sock, runner):
            sock.bind(f"tcp://{HOST}:*")
            link.tell(sock.getsockopt_string(zmq.LAST_ENDPOINT))
            # libzmq connects in the background; the connection is ready by then.
            runner.run(greet())
            yield lambda: runner.run(transfer())
            link.meet()

    return Method(send, receive)


def ray(*, clone: bool) -> Method:
    """Ray's object store: a driver puts a dict of arrays, and another gets it.

    The store is memory that all processes of a machine share. A get does not copy: its tensors are
    read-only views of the store. Arrays are used because Ray pickles tensors with their bytes. The
    cluster ends with its two drivers, or it would disturb the next methods. As clusters run for
    long, the state is sent once before the clock starts, so that the store has its memory: a
    process's peak does not show it.

    Args:
        clone: The receiver copies all tensors, to memory that it owns and can write to.
    """
    # Ray reads some of these when it is imported.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")
    module = importlib.import_module("ray")
    queues = importlib.import_module("ray.util.queue")
    if shutil.disk_usage(SHARED_MEMORY).free < RAY_STORE:
        raise ImportError(f"ray's store needs {RAY_STORE >> 30} GiB free in {SHARED_MEMORY}")

    @contextlib.contextmanager
    def driver(**options: Any) -> Iterator[Any]:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            yield module.init(namespace="benchmark", **quiet, **options)
        finally:
            module.shutdown()

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        def transfer() -> None:
            reference = module.put({name: tensor.numpy() for name, tensor in state.items()})
            # In a list, or the queue's actor would get the arrays.
            queue.put([reference])

        # A temporary folder, or Ray would write to the home directory.
        token = os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
        options = {"num_cpus": 0, "object_store_memory": RAY_STORE, "include_dashboard": False}
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            driver(_temp_dir=folder, **options) as cluster,
        ):
            link.tell((cluster.address_info["gcs_address"], token))
            queue = queues.Queue(actor_options={"num_cpus": 0})
            link.tell(module.cloudpickle.dumps(queue))
            transfer()
            link.hear()
            yield transfer
            link.hear()

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        def transfer() -> State:
            (reference,) = queue.get()
            arrays = module.get(reference)
            with warnings.catch_warnings():
                # The arrays are read-only.
                warnings.simplefilter("ignore", UserWarning)
                state = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return {name: tensor.clone() for name, tensor in state.items()} if clone else state

        address, os.environ["RAY_AUTH_TOKEN"] = link.hear()
        with driver(address=address):
            queue = pickle.loads(link.hear())
            transfer()
            # Ray frees objects once a second; the next object then takes the same memory.
            time.sleep(2)
            link.tell()
            yield transfer
        # The cluster stays until this driver has left it.
        link.tell()

    return Method(send, receive)


def tensorizer() -> Method:
    """Files in ``/dev/shm``, as the serializer of tensorizer has to seek.

    The receiver starts on a file when it is complete, and reads it into new memory. The serializer
    always computes SHA-256 and CRC-32 of each tensor; the receiver by default verifies neither. The
    index of a file is limited, and cannot hold 10,000 tensors; many tensors take several files.
    """
    module = importlib.import_module("tensorizer")

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        def transfer() -> None:
            for path, part in zip(paths, parts, strict=True):
                serializer = module.TensorSerializer(path)
                serializer.write_state_dict(part)
                serializer.close()
                sock.sendall(b"!")

        items, count = list(state.items()), TENSORIZER_TENSORS
        parts = [dict(items[start : start + count]) for start in range(0, len(items), count)]
        with link.socket() as sock, tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
            paths = [os.path.join(folder, f"{number}.tensors") for number in range(len(parts))]
            link.tell(paths)
            yield transfer
            link.meet()

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        def transfer() -> State:
            state: State = {}
            for path in paths:
                sock.recv(1)
                with module.TensorDeserializer(path, device="cpu") as tensors:
                    # The tensors arrive as parameters.
                    state |= {name: tensor.detach() for name, tensor in tensors.items()}
            return state

        with link.socket() as sock:
            paths = link.hear()
            yield transfer
            link.meet()

    return Method(send, receive)


PEERS: dict[str, Callable[[], Method]] = {
    "streaming": streaming,
    "torch.save + asyncio": torch_save,
    "safetensors + asyncio": safetensors,
    "torchft http": torchft_http,
    "gloo": gloo,
    "pyzmq": pyzmq,
    "ray": functools.partial(ray, clone=False),
    "ray + clone": functools.partial(ray, clone=True),
    "tensorizer": tensorizer,
}
