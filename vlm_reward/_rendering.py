"""Choice of MuJoCo's rendering backend. Imports nothing of mujoco, which reads `MUJOCO_GL` when imported."""

import ctypes
import ctypes.util
import importlib
import multiprocessing
import os
import sys

INSTALL_HINT = (
    "no headless renderer found: install one with `apt-get install -y libegl1 libosmesa6` (Debian, Ubuntu), "
    "or set MUJOCO_GL=glfw on a machine with a display"
)


def select_backend() -> str | None:
    """Set `MUJOCO_GL` unless the user did: EGL where a display initialises, else OSMesa, else leave it.

    Returns the backend's name, or None where none works (rendering then raises with `INSTALL_HINT`; all
    that needs no pictures still runs) or where the platform brings its own (macOS, Windows).
    """
    if (
        multiprocessing.parent_process() is not None
    ):  # else each worker has as many rasterisers as there are cores
        os.environ.setdefault("LP_NUM_THREADS", "0")
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if not sys.platform.startswith("linux"):
        return None
    backend = "egl" if _egl_works() else "osmesa" if ctypes.util.find_library("OSMesa") else None
    if backend:
        os.environ["MUJOCO_GL"] = backend
        if "mujoco" in sys.modules:  # imported first, it has chosen GLFW, which needs a display
            importlib.reload(sys.modules["mujoco.gl_context"])
    return backend


def _egl_works() -> bool:
    """Whether any EGL device gives a display; asks as MuJoCo does: devices first, then their displays."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    platform_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not platform_display:
        return False
    devices = (ctypes.c_void_p * 16)()
    count = ctypes.c_int32()
    query_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32)
    )(query)
    if not query_devices(16, devices, ctypes.byref(count)):
        return False
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p)(
        platform_display
    )
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    egl_platform_device_ext = 0x313F
    return any(
        (display := get_display(egl_platform_device_ext, devices[i], None))
        and egl.eglInitialize(display, None, None)
        for i in range(count.value)
    )
