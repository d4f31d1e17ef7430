"""A guest as QEMU options: its fixed frame, and the devices tests hang into it.

The guest's RAM is one shared memfd called ram0, as every vhost-user backend needs it.
This file must not know how QEMU is started.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.vm.stack import Kernel

# panic=0: a guest that panics stays where it is, with its reason on the console.
# no_timer_check: on a busy host the emulated timer may be late, which Linux takes for a broken one.
_APPEND = "console=ttyS0 panic=0 mitigations=off random.trust_cpu=on nokaslr no_timer_check"


def balloon_device(socket_path: str | Path, id: str = "balloon") -> list[str]:
    """QEMU options for a vhost-user balloon whose backend listens at `socket_path`."""
    return [
        *("-chardev", f"socket,id={id},path={socket_path}"),
        "-device",
        f"vhost-user-test-device-pci,chardev={id},virtio-id=5,num_vqs=5,config_size=16,vq_size=128",
    ]


def window_device(size: int, address: int, index: int = 0, name: str | None = None) -> list[str]:
    """QEMU options for a hidden memory window: `size` bytes at guest-physical `address`.

    The memfd is called `name`, by default w0 for index 0. The guest never sees the device: it is
    function 1 of a slot without a function 0. Needs `max_memory` in boot() and an address in its
    hot-plug range.
    """
    name = name or f"w{index}"
    return [
        *("-object", f"memory-backend-memfd,id={name},size={size},share=on"),
        "-device",
        f"virtio-pmem-pci,memdev={name},memaddr={address:#x},addr={0x1E - index:x}.1,"
        f"id=window{index}",
    ]


def memory_device(socket_path: str | Path, index: int, size: int, address: int) -> list[str]:
    """QEMU options for a vhost-user virtio-mem device and its window, called mem0-window."""
    id = f"mem{index}"
    return [
        *window_device(size, address, index, f"{id}-window"),
        *("-chardev", f"socket,id={id},path={socket_path}"),
        "-device",
        f"vhost-user-test-device-pci,chardev={id},virtio-id=24,num_vqs=1,config_size=56"
        ",vq_size=128",
    ]


def disk_device(socket_path: str | Path, id: str = "disk0") -> list[str]:
    """QEMU options for a vhost-user virtio-pmem device whose region the backend supplies."""
    return [
        *("-chardev", f"socket,id={id},path={socket_path}"),
        "-device",
        f"vhost-user-test-device-pci,chardev={id},virtio-id=27,num_vqs=1,config_size=16,vq_size=64",
    ]


@dataclass(frozen=True)
class Machine:
    """What boot() was asked for. `memory` and `max_memory` are sizes as QEMU writes them.

    shared: its RAM can be seen by others than QEMU.
    All boot memory and all processors are in the first of several NUMA nodes.
    """

    kernel: Kernel
    memory: str
    max_memory: str | None
    smp: int
    append: str
    devices: tuple[str, ...]
    nodes: int = 1
    shared: bool = True

    def options(self, folder: Path) -> list[str]:
        """QEMU's options, but for the chardevs `agent` and `qmp`; logs and sockets in `folder`."""
        memory, share = self.memory, "on" if self.shared else "off"
        if self.max_memory is not None:
            memory += f",maxmem={self.max_memory},slots=8"
        machine, numa = "q35,memory-backend=ram0", list[str]()
        if self.nodes > 1:
            machine, numa = "q35", ["-numa", "node,nodeid=0,cpus=0-1,memdev=ram0"]
        for node in range(1, self.nodes):
            numa += ["-numa", f"node,nodeid={node}"]
        return [
            *("-machine", machine, "-smp", str(self.smp), "-m", memory),
            *("-object", f"memory-backend-memfd,id=ram0,size={self.memory},share={share}"),
            *numa,
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-kernel", str(self.kernel.image), "-initrd", str(self.kernel.initramfs)),
            *("-append", f"{_APPEND} {self.append}".strip()),
            *("-chardev", f"file,id=console,path={folder / 'console.log'}"),
            *("-device", "isa-serial,chardev=console,index=0"),
            *("-device", "isa-serial,chardev=agent,index=1"),
            *("-qmp", "chardev:qmp"),
            *("-qmp", f"unix:{folder / 'qmp.sock'},server=on,wait=off"),
            *self.devices,
        ]
