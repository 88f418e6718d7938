"""What the kernel is asked to keep from a process: namespaces, limits of resources, and a filter of system calls.

Linux on x86-64, by the C library alone. The filter is a list of what is allowed, and all else is refused: a call that
no kernel had when this was written is refused too. A refused call stops the process before it is made, and whoever
holds the listener of the filter is told its number. Files cannot be opened at all, for reading neither; a call that
only asks or opens for reading is answered "no", for libraries ask after files that they can do without.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from fcntl import ioctl

WRITES, READS, NETWORK, PROCESS, SYSTEM_CALL = "write", "read", "network", "process", "system call"

NEW_SPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x00020000  # user, network, IPC, mounts
NO_NEW_PRIVILEGES, DEATH_SIGNAL = 38, 1  # of prctl
SECCOMP = 317  # the number of the system call itself
X86_64 = 0xC000003E
ALLOW, ERRNO, NOTIFY, KILL = 0x7FFF0000, 0x00050000, 0x7FC00000, 0x80000000
EACCES, ENOTTY = 13, 25
RECEIVE = 0xC0502100  # ioctl: what was notified; 80 bytes
NOTIFICATION = 80

#: Calls that compute, wait, ask for memory, or touch what is open already.
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "readv": 19, "writev": 20,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "sendmsg": 46, "exit": 60,
    "uname": 63, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
    "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201,
    "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "set_robust_list": 273, "getcpu": 309, "getrandom": 318,
    "membarrier": 324, "rseq": 334,
}  # fmt: skip
#: Calls that only ask after a file: the answer is that it may not.
ASKS = {
    "stat": 4, "lstat": 6, "access": 21, "getcwd": 79, "readlink": 89, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "statx": 332, "faccessat2": 439,
}  # fmt: skip
OPEN, OPENAT, IOCTL, PRLIMIT, TGKILL = 2, 257, 16, 302, 234
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0x400000  # the last is O_TMPFILE's own bit

#: What a refused call is called, by number; of any other one only the number is said.
REFUSED = {
    WRITES: {
        "open": 2, "openat": 257, "openat2": 437, "creat": 85, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "rename": 82,
        "renameat": 264, "renameat2": 316, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266, "unlink": 87,
        "unlinkat": 263, "truncate": 76, "ftruncate": 77, "fallocate": 285, "chmod": 90, "fchmod": 91, "fchmodat": 268,
        "chown": 92, "fchown": 93, "fchownat": 260, "utime": 132, "utimes": 235, "utimensat": 280, "mknod": 133,
        "mknodat": 259, "setxattr": 188, "fsetxattr": 190, "memfd_create": 319, "pwrite64": 18, "sendfile": 40,
        "copy_file_range": 326, "shmget": 29, "mount": 165,
    },
    READS: {"chdir": 80, "fchdir": 81, "chroot": 161, "getdents": 78, "getdents64": 217, "pread64": 17},
    NETWORK: {
        "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "recvmsg": 47, "shutdown": 48,
        "bind": 49, "listen": 50, "socketpair": 53, "accept4": 288, "sendmmsg": 307,
    },
    PROCESS: {
        "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "clone3": 435, "kill": 62, "tkill": 200,
        "tgkill": 234, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434,
        "pidfd_send_signal": 424, "pidfd_getfd": 438, "setsid": 112, "setpgid": 109,
    },
    SYSTEM_CALL: {
        "ioctl": 16, "fcntl": 72, "dup": 32, "dup2": 33, "pipe": 22, "pipe2": 293, "prctl": 157, "unshare": 272,
        "setns": 308, "seccomp": 317, "bpf": 321, "io_uring_setup": 425, "prlimit64": 302, "setrlimit": 160,
        "setuid": 105, "setgid": 106, "keyctl": 250, "perf_event_open": 298, "userfaultfd": 323, "shmat": 30,
    },
}  # fmt: skip
NAMES = {number: (kind, name) for kind, calls in REFUSED.items() for name, number in calls.items()}

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_socket = _libc.socket if _libc is not None else None  # looked up before anything listens to what Python does


def missing() -> str | None:
    """Why this machine cannot have the filter; None where it may."""
    if sys.platform != "linux":
        return f"it needs Linux and this is {sys.platform}"
    if platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        return f"its filter is written for x86-64 and this is {platform.machine()}"
    return None


def separate() -> bool:
    """Put the calling process into namespaces of its own: no network device, no right over anything outside."""
    return _libc is not None and _libc.unshare(NEW_SPACES) == 0


def limit(seconds: float, memory: int) -> None:
    """Limits of the calling process, which it cannot raise again.

    Args:
        seconds: of processor time.
        memory: bytes of addresses beyond those it has now.
    """
    with open("/proc/self/statm") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: used + memory,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends, and end now if it has ended before this could be asked for."""
    _libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def install() -> int:
    """Put the filter on the calling process, for good, and return its listener: a descriptor for `refused`.

    Raises:
        OSError: the kernel does not take it.
    """
    code = program(os.getpid())
    if _libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs is refused")
    buffer = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    listener = _libc.syscall(SECCOMP, 1, 8, described)  # set a filter, and give its listener
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp with a listener is refused")
    return listener


def ask_for_socket() -> int:
    """What the filter is tried with: the call itself, of which Python announces nothing."""
    return _socket(2, 2, 0)


def refused(listener: int) -> tuple[str, str]:
    """The kind and the name of the call that a process stands before; it waits, and is to be killed."""
    told = bytearray(NOTIFICATION)
    ioctl(listener, RECEIVE, told)
    number = struct.unpack_from("=i", told, 16)[0]
    return NAMES.get(number, (SYSTEM_CALL, f"number {number}"))


def program(pid: int) -> bytes:
    """The filter as the kernel reads it: eight bytes an instruction."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06  # of classic BPF: a word, two jumps, return
    number, architecture = 0, 4

    def low(argument: int) -> int:
        return 16 + 8 * argument

    lines = [(load, 0, 0, architecture), (equal, 1, 0, X86_64), (give, 0, 0, KILL), (load, 0, 0, number)]

    def answer(call: int, action: int) -> None:
        lines.extend([(equal, 0, 1, call), (give, 0, 0, action)])

    for call in ALLOWED.values():
        answer(call, ALLOW)
    for call in ASKS.values():
        answer(call, ERRNO | EACCES)
    answer(IOCTL, ERRNO | ENOTTY)
    for call, flags in ((OPEN, 1), (OPENAT, 2)):
        lines += [(equal, 0, 4, call), (load, 0, 0, low(flags)), (any_bit, 0, 1, WRITING), (give, 0, 0, NOTIFY)]
        lines += [(give, 0, 0, ERRNO | EACCES)]
    # a signal to itself, which is how a library aborts; reading limits, not setting them
    lines += [
        (equal, 0, 4, TGKILL),
        (load, 0, 0, low(0)),
        (equal, 0, 1, pid),
        (give, 0, 0, ALLOW),
        (give, 0, 0, NOTIFY),
    ]
    lines += [(equal, 0, 6, PRLIMIT), (load, 0, 0, low(2)), (equal, 0, 3, 0), (load, 0, 0, low(2) + 4)]
    lines += [(equal, 0, 1, 0), (give, 0, 0, ALLOW), (give, 0, 0, NOTIFY)]
    lines.append((give, 0, 0, NOTIFY))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
