"""A seccomp filter: the system calls that a program under test has no use for are refused (EPERM).

No new process, no other program, no network, no signal to or look at another process, no changed attributes of files.
Threads are allowed. Numbers beyond the table do not exist (ENOSYS), so a call of a newer kernel is none of the
allowed ones. Numbers: linux arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import struct

from kvcli.sandbox.inside import kernel

TABLE = """
# processes and programs
fork 57 -; vfork 58 -; execve 59 221; execveat 322 281; setsid 112 157; setpgid 109 154;
# other processes
kill 62 129; tkill 200 130; tgkill 234 131; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240;
pidfd_open 434 434; pidfd_getfd 438 438; pidfd_send_signal 424 424; ptrace 101 117; process_vm_readv 310 270;
process_vm_writev 311 271; process_madvise 440 440; process_mrelease 448 448; kcmp 312 272;
setpriority 141 140; ioprio_set 251 30; sched_setscheduler 144 119; sched_setparam 142 118;
sched_setattr 314 274; migrate_pages 256 238; move_pages 279 239;
# the network, and queues and memory that other processes could reach
socket 41 198; connect 42 203; bind 49 200; listen 50 201; accept 43 202; accept4 288 242; shmget 29 194;
shmat 30 196; shmctl 31 195; msgget 68 186; msgsnd 69 189; msgrcv 70 188; msgctl 71 187; semget 64 190;
semop 65 193; semctl 66 191; semtimedop 220 192; mq_open 240 180; mq_unlink 241 181; mq_notify 244 184;
memfd_create 319 279; memfd_secret 447 447;
# attributes of files, which landlock does not guard
chmod 90 -; fchmod 91 52; fchmodat 268 53; chown 92 -; lchown 94 -; fchown 93 55; fchownat 260 54; utime 132 -;
utimes 235 -; futimesat 261 -; utimensat 280 88; setxattr 188 5; lsetxattr 189 6; fsetxattr 190 7;
removexattr 197 14; lremovexattr 198 15; fremovexattr 199 16; truncate 76 45; mknod 133 -; mknodat 259 33;
inotify_init 253 -; inotify_init1 294 26; fanotify_init 300 262; open_by_handle_at 304 265;
name_to_handle_at 303 264;
# name spaces, mounts and the kernel
mount 165 40; umount2 166 39; pivot_root 155 41; chroot 161 51; unshare 272 97; setns 308 268;
open_tree 428 428; move_mount 429 429; fsopen 430 430; fsconfig 431 431; fsmount 432 432; fspick 433 433;
mount_setattr 442 442; keyctl 250 219; add_key 248 217; request_key 249 218; bpf 321 280;
perf_event_open 298 241; userfaultfd 323 282; io_uring_setup 425 425; io_uring_enter 426 426;
io_uring_register 427 427; init_module 175 105; finit_module 313 273; delete_module 176 106;
kexec_load 246 104; kexec_file_load 320 294; reboot 169 142; swapon 167 224; swapoff 168 225; quotactl 179 60;
quotactl_fd 443 443; acct 163 89; syslog 103 116; settimeofday 164 170; clock_settime 227 112;
adjtimex 159 171; clock_adjtime 305 266; sethostname 170 161; setdomainname 171 162; iopl 172 -; ioperm 173 -;
personality 135 92; vhangup 153 58; lookup_dcookie 212 18;
# looked at more closely
clone 56 220; clone3 435 435; prlimit64 302 261; sched_setaffinity 203 122; fcntl 72 25; ioctl 16 29;
prctl 157 167;
"""
"""name, number on x86_64, number on aarch64; the words behind # say what the lines below them are about."""

CLOSER = "# looked at more closely\n"
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""The kernel's audit numbers, and the column of the table."""
LAST = 450
"""The last number that the table was made for."""
CLONE_THREAD = 0x10000
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
NUMBER, ARCH, ARGS = 0, 4, 16
"""Offsets in the kernel's struct seccomp_data; arguments have 8 bytes."""
LOAD, EQUAL, GREATER_EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

Line = tuple[int, int, int, int]
"""One instruction of classic BPF: code, jump if true, jump if false, value."""

FORBIDDEN_ARGUMENTS = {
    "fcntl": (1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to other processes
    "ioctl": (1, (0x5412, 0x541C, 0x8901, 0x8902)),  # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
    "prctl": (0, (kernel.PR_SET_PDEATHSIG,)),  # it must end with kvcli, killed or not
}
OWN_PROCESS_ONLY = ("prlimit64", "sched_setaffinity")
"""Their first argument must be 0, which means the caller."""


def apply() -> None:
    """Puts the filter on this process, for good. Raises OSError where there is none for this machine."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"no seccomp filter for {machine}")
    code = b"".join(struct.pack("HBBI", *line) for line in program(machine))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header, len(header)))


def program(machine: str) -> list[Line]:
    """The filter for a machine."""
    arch, _ = ARCHITECTURES[machine]
    numbers, closer = calls(machine)
    lines: list[Line] = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    lines += [(GREATER_EQUAL, 0, 1, LAST + 1), (RETURN, 0, 0, REFUSE | ENOSYS)]
    lines += [(EQUAL, 0, 1, closer["clone3"]), (RETURN, 0, 0, REFUSE | ENOSYS)]  # libc falls back to clone
    for number in numbers:
        lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | EPERM)]
    lines += _block(
        closer["clone"], [(LOAD, 0, 0, ARGS), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, REFUSE | EPERM)]
    )
    for name in OWN_PROCESS_ONLY:
        own = [(LOAD, 0, 0, ARGS), (EQUAL, 1, 0, 0), (RETURN, 0, 0, REFUSE | EPERM)]
        lines += _block(closer[name], own)
    for name, (argument, values) in FORBIDDEN_ARGUMENTS.items():
        body: list[Line] = [(LOAD, 0, 0, ARGS + 8 * argument)]
        for value in values:
            body += [(EQUAL, 0, 1, value), (RETURN, 0, 0, REFUSE | EPERM)]
        lines += _block(closer[name], body)
    return [*lines, (RETURN, 0, 0, ALLOW)]


def _block(number: int, body: list[Line]) -> list[Line]:
    """What is asked of one call; a call that passes is allowed."""
    return [(EQUAL, 0, len(body) + 1, number), *body, (RETURN, 0, 0, ALLOW)]


def calls(machine: str) -> tuple[list[int], dict[str, int]]:
    """Numbers that are refused whatever their arguments, and those looked at more closely by name."""
    _, column = ARCHITECTURES[machine]
    refused, closer = (
        {name: numbers[column] for name, numbers in table(part).items() if numbers[column] is not None}
        for part in TABLE.split(CLOSER)
    )
    return sorted(n for n in refused.values() if n is not None), {k: n for k, n in closer.items() if n is not None}


def table(text: str) -> dict[str, tuple[int | None, int | None]]:
    """Numbers by name; None where a machine has no such call."""
    words = " ".join(line for line in text.splitlines() if not line.startswith("#"))
    entries = [entry.split() for entry in words.split(";") if entry.strip()]
    return {name: (_number(x86), _number(arm)) for name, x86, arm in entries}


def _number(text: str) -> int | None:
    return None if text == "-" else int(text)
