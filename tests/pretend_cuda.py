"""Run the stages on CUDA devices that are only pretended, and count what makes the host wait.

    python tests/pretend_cuda.py [--devices 2] [--fail PLACE] [--report FILE] ppo.py [flags]
    python tests/pretend_cuda.py --jobs jobs.json

A tensor on "cuda:0" is a wrapper that holds a CPU tensor: each operation computes real numbers on
the CPU, and what real CUDA refuses raises here too. It pretends
- devices: tensors of two devices in one operation raise, except for what CUDA allows (CPU scalars,
  CPU indices, copies); .numpy() raises; autocast, autograd (a thread per device), fused and foreach
  optimizers are those of CUDA; CUDA starts when it is first needed, as the real one does;
- memory: bytes of live storages and their peak, behind torch.cuda.*memory_allocated;
- errors: --fail PLACE:N raises out of memory at the N-th allocation or wait in a place: a function,
  backward, or a phase and step of the run, like log-probabilities@2;
- waiting: .item(), nonzero, indexing by a bool mask and blocking copies stop the host until the
  device is done; each is counted by the line of the script's folder that caused it;
- cumsum of floats, which raises under torch.use_deterministic_algorithms(True).
The report also has the peak by phase and step, where random numbers were drawn on a device, where a
float64 was made on one, and which functions of torch.cuda the scripts called.

It does not show speed, kernels (attention is the plain one; no TF32, no atomics, no --compile), the
device's own random numbers, memory within an operation, fragmentation, streams or pinned memory. It
needs a CPU build of torch and, once, g++: such a build has no device guard for CUDA.
"""

import argparse
import collections
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import weakref

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
static thread_local c10::DeviceIndex current = 0;
static c10::DeviceIndex count() { return std::atoi(std::getenv("PRETEND_CUDA_DEVICES")); }
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  using D = c10::Device;
  using S = c10::Stream;
  D exchangeDevice(D d) const override { D old = getDevice(); current = d.index(); return old; }
  D getDevice() const override { return D(c10::kCUDA, current); }
  void setDevice(D d) const override { current = d.index(); }
  void uncheckedSetDevice(D d) const noexcept override { current = d.index(); }
  S getStream(D d) const noexcept override { return S(S::DEFAULT, d); }
  S exchangeStream(S s) const noexcept override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return count(); }
  void record(void**, const S&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const S&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return count(); }
  DeviceIndex deviceCount() const override { return count(); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def load_guard():
    """Compile and load GUARD; torch, which asks once whether there is CUDA, comes after it."""
    torch_folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    key = hashlib.sha256(f"{GUARD}{torch_folder}{include.stat().st_mtime}".encode()).hexdigest()
    library = pathlib.Path(tempfile.gettempdir()) / f"pretend_cuda_{os.getuid()}_{key[:16]}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-w", "-x", "c++", "-", "-o", fresh]
        command += [f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
        subprocess.run([*command, "-ltorch_cpu", "-lc10"], input=GUARD.encode(), check=True)
        fresh.replace(library)
    os.environ["PRETEND_CUDA_DEVICES"] = "1"
    ctypes.CDLL(str(library))


assert "torch" not in sys.modules, "import pretend_cuda before torch"
load_guard()

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITS = {"_local_scalar_dense": ".item()"} | {name: name for name in (
    "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "bincount",
)}
MIXES_SCALARS = {"where", "masked_fill", "masked_fill_", "fill_", "_fused_adam_", "_fused_adamw_"}
options = argparse.Namespace(devices=1, fail=None, folder=os.getcwd())
# {(what, phase, step, place): times}
waits, draws, doubles = (collections.Counter() for _ in range(3))
calls = collections.Counter()  # {(function of torch.cuda, place in the scripts): times}
in_use, peak = collections.Counter(), collections.Counter()  # bytes by device index
peaks = {}  # {(device index, phase, step): bytes}
state = {"current": 0, "faults": 0, "started": "", "phase": "loading", "step": 0}
blocks = weakref.WeakValueDictionary()  # address -> Block


class Block:
    """The memory of one storage, given back when no tensor holds it any more."""

    def __init__(self, size, index):
        maybe_fail()
        self.size, self.index = -(-size // 512) * 512, index  # rounded as by CUDA's allocator
        in_use[index] += self.size
        peak[index] = max(peak[index], in_use[index])
        key = (index, *now())
        peaks[key] = max(peaks.get(key, 0), in_use[index])

    def __del__(self):
        if hasattr(self, "index"):
            in_use[self.index] -= self.size


class CudaTensor(torch.Tensor):
    """A CPU tensor, `held`, that says it is on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, device):
        address, size = held.untyped_storage().data_ptr(), held.untyped_storage().nbytes()
        block = blocks.get(address) if size else None
        block = block or Block(size, device.index)
        if size:
            blocks[address] = block
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=device,
        )
        self.block, self.held = block, held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    untyped_storage = lambda self: self.held.untyped_storage()
    data_ptr = lambda self: self.held.data_ptr()
    tolist = lambda self: self.cpu().tolist()
    __repr__ = lambda self: f"{self.held!r} on {self.device}"

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                memo[id(self)]._is_param = True
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        wait("copy to the host")
        return self.held.detach().__reduce_ex__(protocol)


class Pretend(TorchDispatchMode):
    """Sees the operations that have no CudaTensor yet: factories, and copies to a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def on_device(device):
    """A CUDA device with its index, or None for another kind."""
    if device is not None:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device is None or device.type != "cuda":
        return None
    index = state["current"] if device.index is None else device.index
    if index >= options.devices:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", index)


def tensors_in(x):
    """The tensors in a nest of lists, tuples and dicts."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, (list, tuple, dict)):
        return sum(map(tensors_in, x.values() if isinstance(x, dict) else x), [])
    return []


def mapped(function, x):
    """The same nest of lists, tuples and dicts with function(tensor) in place of each tensor."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, dict):
        return {key: mapped(function, each) for key, each in x.items()}
    return type(x)([mapped(function, e) for e in x]) if isinstance(x, (list, tuple)) else x


def run(func, args, kwargs):
    """One operation: checked as CUDA would, computed on the CPU."""
    tensors = tensors_in((args, kwargs))
    ours = [x for x in tensors if isinstance(x, CudaTensor)]
    plain = [x for x in tensors if not isinstance(x, CudaTensor)]
    target = on_device(kwargs.get("device"))
    if not ours and target is None:
        return func(*args, **kwargs)
    name, to_host = func.overloadpacket.__name__, kwargs.get("device") and target is None
    home = None if to_host else target or ours[0].device
    check_devices(func, name, args, ours, plain)
    count_waits(name, args, kwargs, target, to_host)
    if name == "cumsum" and torch.are_deterministic_algorithms_enabled():
        if ours[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
    if torch.Tag.nondeterministic_seeded in func.tags and home is not None:
        if getattr(kwargs.get("generator"), "device", home).type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        draws[name, *now(), place()] += 1
    given, named = mapped(lambda x: getattr(x, "held", x), (args, kwargs))
    if "device" in named:
        named["device"] = torch.device("cpu")
    named.pop("pin_memory", None)
    result = func(*given, **named)
    known = {id(x.held): x for x in ours} | {id(x): x for x in plain}

    def wrap(x):  # an operation in place returns what it was given
        if home is not None and x.dtype == torch.float64:
            doubles[name, *now(), place()] += 1
        return known[id(x)] if id(x) in known else x if home is None else CudaTensor(x, home)

    return mapped(wrap, result)


def check_devices(func, name, args, ours, plain):
    if name in ("copy_", "_to_copy"):
        return
    if name in INDEXED:
        strangers = {x.device for x in args[1] if x is not None} - {args[0].device}
        if strangers - {torch.device("cpu")}:
            raise RuntimeError("indices should be either on cpu or on the same device as the "
                               f"indexed tensor ({args[0].device})")
        tensors = [args[0], *tensors_in(args[2:3])]
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        plain = [x for x in tensors if not isinstance(x, CudaTensor)]
    scalars = torch.Tag.pointwise in func.tags or name.startswith("_foreach")
    if scalars or name in MIXES_SCALARS | INDEXED:
        plain = [x for x in plain if x.dim() > 0]
    devices = {x.device for x in [*ours, *plain]}
    if len(devices) > 1:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, {' and '.join(sorted(map(str, devices)))}! ({func})")


def count_waits(name, args, kwargs, target, to_host):
    if name in WAITS:
        wait(WAITS[name])
    elif name in INDEXED and isinstance(args[0], CudaTensor):
        for index in tensors_in(args[1]):
            is_mask = index.dtype in (torch.bool, torch.uint8)
            if not isinstance(index, CudaTensor):
                wait("copy of an index to the device")
            elif is_mask and (name == "index" or args[2].dim() > 0):  # else it is a masked_fill
                wait("index by a mask")
    elif name == "_to_copy" and not kwargs.get("non_blocking"):
        if to_host or target is not None and target != args[0].device:
            wait("copy to the host" if to_host else "copy to the device")
    elif name == "copy_" and not (args[2:3] or [kwargs.get("non_blocking")])[0]:
        if isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
            wait("copy to the device" if isinstance(args[0], CudaTensor) else "copy to the host")


def wait(kind):
    """The host waits for the device here."""
    waits[kind, *now(), place()] += 1
    maybe_fail()


def frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@functools.lru_cache(None)
def owner_of(file):
    """Whose a file is: the scripts', a library's, or nobody's that a reader asks about."""
    if "site-packages" in file:
        return "" if f"{os.sep}torch{os.sep}" in file else "library"
    return "script" if file.startswith(options.folder) and file != __file__ else ""


def place():
    """The innermost line of the script's own folder, and the library's line that asked, if any."""
    library = ""
    for frame in frames():
        owner = owner_of(frame.f_code.co_filename)
        if owner == "script" or owner == "library" and not library:
            file = os.path.basename(frame.f_code.co_filename)
            here = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
            if owner == "script":
                return f"{here} <- {library}" if library else here
            library = here
    return library or "(in the backward pass)"


def now():
    """(phase, step) of the run, as harness.Run.phase and steps have it."""
    return state["phase"], state["step"]


def follow_run():
    """Lets the phases of harness.Run be known here."""
    import harness

    enter = harness.Run.phase

    def phase(run, name):
        seconds = enter(run, name)
        state["phase"], state["step"] = name, run.step
        return seconds

    harness.Run.phase = phase


def maybe_fail():
    """Raise what --fail asks for, if this is the place."""
    where, _, number = (options.fail or "").partition(":")
    if not where:
        return
    phase, at, step = where.partition("@")
    if at:
        is_here = now() == (phase, int(step))
    else:
        is_here = where in {frame.f_code.co_name for frame in frames()}
        is_here |= where == "backward" and threading.current_thread() != threading.main_thread()
    state["faults"] += is_here
    if is_here and state["faults"] == int(number or 1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def make_tensor(original, data, **kwargs):
    """torch.tensor, which asks each tensor in a list for its number behind all modes' backs."""
    if isinstance(data, (list, tuple)):
        data = mapped(lambda x: x.item() if isinstance(x, CudaTensor) else x, data)
    return original(data, **kwargs)


def start():
    """CUDA is needed for the first time: what was asked of it before is done."""
    if not torch.cuda._initialized:
        torch.cuda._initialized, state["started"] = True, place()
        for call in (*torch.cuda._lazy_seed_tracker.get_calls(), *torch.cuda._queued_calls):
            if call:
                call[0]()


def counted(name, function):
    """The same function of torch.cuda; calls from the scripts' own lines are noted."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if owner_of(sys._getframe(1).f_code.co_filename) == "script":
            calls[name, place()] += 1
        return function(*args, **kwargs)

    return wrapper


def install(devices=1):
    """Give this process its devices; call it before anything has asked for CUDA."""
    options.devices, os.environ["PRETEND_CUDA_DEVICES"] = devices, str(devices)
    index_of = lambda device=None: on_device("cuda" if device is None else device).index

    def exchange(index):
        old, state["current"] = state["current"], max(index, 0)
        return old

    replaced = {
        "is_available": lambda: True, "device_count": lambda: devices, "_lazy_init": start,
        "current_device": lambda: state["current"],
        "set_device": lambda device: state.update(current=index_of(device)),
        "_exchange_device": exchange, "_maybe_exchange_device": exchange,
        "synchronize": lambda device=None: (start(), index_of(device), wait("synchronize"))[2],
        "memory_allocated": lambda device=None: in_use[index_of(device)],
        "max_memory_allocated": lambda device=None: peak[index_of(device)],
        "reset_peak_memory_stats": lambda device=None: peak.update(
            {index_of(device): in_use[index_of(device)] - peak[index_of(device)]}),
        "empty_cache": lambda: None, "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "default_generators": tuple(torch.Generator() for _ in range(devices)),
    }
    torch.cuda._queued_calls.clear()
    for name in {*replaced, *torch.cuda.__all__}:
        value = replaced.get(name, getattr(torch.cuda, name, None))
        if isinstance(value, types.FunctionType):
            value = value if name.startswith("_") else counted(name, value)
        elif name not in replaced:
            continue
        for module in (torch.cuda, torch.cuda.random):
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        sys.modules[module]._foreach_supported_types.append(CudaTensor)
    _device_constructors()  # remembers the torch.tensor of now
    torch.tensor = functools.partial(make_tensor, torch.tensor)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=) moves one from the CPU
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to keeps its parameters


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--fail", help="FUNCTION:N or PHASE@STEP:N, where memory runs out")
    parser.add_argument("--deterministic", action="store_true", help="only such algorithms")
    parser.add_argument("--report", help="a JSON file for all that is counted")
    parser.add_argument("--jobs", help="a JSON file, {name: [the arguments of a run, ...]}")
    parser.add_argument("script", nargs="?")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.parse_args(argv, namespace=options)


def run_script():
    """The script with its arguments, in this process, on the devices of the options."""
    script = pathlib.Path(options.script).resolve()
    options.folder = sys.path[0] = str(script.parent)
    sys.argv = [options.script, *options.arguments]
    install(options.devices)
    torch.use_deterministic_algorithms(options.deterministic)
    follow_run()
    try:
        with Pretend():
            runpy.run_path(str(script), run_name="__main__")
    finally:
        if options.report:
            pathlib.Path(options.report).write_text(json.dumps(report(), indent=1))


def report():
    names = ("what", "phase", "step", "at")
    rows = lambda counter: [dict(zip(names, k)) | {"times": n} for k, n in counter.most_common()]
    of_phase = lambda k: dict(zip(("device", "phase", "step"), k))
    return {
        "started": state["started"], "peak": {f"cuda:{i}": n for i, n in peak.items()},
        "peaks": [of_phase(k) | {"bytes": n} for k, n in peaks.items()],
        "waits": rows(waits), "draws": rows(draws), "float64": rows(doubles),
        "calls": [[*k, n] for k, n in calls.items()],
    }


def serve(jobs, at_once=2):
    """Do all jobs, each a list of runs one after another; every run is a fork of this process,
    which has loaded the libraries. Returns {name: [{"status", "out", "err", "report"}, ...]}.
    """
    import torch._dynamo  # noqa: F401, which optimizers load
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401, by its models
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

    todo, running, results = [(name, 0) for name in jobs], {}, {name: [] for name in jobs}
    with tempfile.TemporaryDirectory() as folder:
        file_of = lambda name, i, kind: pathlib.Path(folder) / f"{name}.{i}.{kind}"
        while todo or running:
            while todo and len(running) < at_once:
                name, i = todo.pop(0)
                pid = os.fork()
                if pid == 0:
                    argv = ["--report", str(file_of(name, i, "report")), *jobs[name][i]]
                    in_child(argv, *(file_of(name, i, kind) for kind in ("out", "err")))
                running[pid] = name, i
            pid, status = os.wait()
            name, i = running.pop(pid)
            found = {kind: file_of(name, i, kind).read_text() for kind in ("out", "err")}
            if file_of(name, i, "report").exists():
                found["report"] = json.loads(file_of(name, i, "report").read_text())
            results[name].append({"status": os.waitstatus_to_exitcode(status)} | found)
            if i + 1 < len(jobs[name]):
                todo.insert(0, (name, i + 1))
    return results


def in_child(argv, out, err):
    """One run of a job, its streams in files; never returns."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    status = 0
    try:
        parse(argv)
        run_script()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    parse(sys.argv[1:])
    if options.jobs:
        print(json.dumps(serve(json.loads(pathlib.Path(options.jobs).read_text()))))
    else:
        run_script()
