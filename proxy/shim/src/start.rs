//! What the standard library and a libc would bring: the entry of the program, and the functions that compiled code
//! calls.
#![expect(
    unsafe_code,
    reason = "the entry has a calling convention of its own, and these functions take raw pointers"
)]

use core::arch::naked_asm;
use core::panic::PanicInfo;

use rproxy_sys_raw::fd::write_error;
use rproxy_sys_raw::process::{Arguments, exit};

/// The entry: passes the stack pointer to [`main`] (System V ABI, "Process Initialization").
// SAFETY: the linker expects this name, and nobody else defines it.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        // The outermost frame.
        "xor ebp, ebp",
        "mov rdi, rsp",
        "and rsp, -16",
        "call {main}",
        "ud2",
        main = sym main,
    );
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        // The outermost frame.
        "mov x29, #0",
        "mov x30, #0",
        "mov x0, sp",
        "bl {main}",
        "brk #1",
        main = sym main,
    );
}

/// Runs the program on the stack that the kernel has prepared.
unsafe extern "C" fn main(stack: *mut usize) -> ! {
    // SAFETY: `_start` passes the stack pointer of the entry, once.
    let mut arguments = unsafe { Arguments::from_stack(stack) };
    exit(crate::run(&mut arguments))
}

/// Copies `len` bytes between buffers that do not overlap (memcpy(3)).
///
/// # Safety
/// As in C.
// SAFETY: the compiler expects this name and this behaviour.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    #[cfg(target_arch = "x86_64")]
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret");
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        "mov x3, x0",
        "cbz x2, 2f",
        "1:",
        "ldrb w4, [x1], #1",
        "strb w4, [x3], #1",
        "subs x2, x2, #1",
        "b.ne 1b",
        "2:",
        "ret",
    );
}

/// Copies `len` bytes between buffers that may overlap (memmove(3)).
///
/// # Safety
/// As in C.
// SAFETY: the compiler expects this name and this behaviour.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // If the destination starts inside of the source, from the end.
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rcx - 1]",
        "lea rsi, [rsi + rcx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    );
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        "sub x5, x0, x1",
        "cmp x5, x2",
        "b.hs {memcpy}",
        "1:",
        "cbz x2, 2f",
        "sub x2, x2, #1",
        "ldrb w4, [x1, x2]",
        "strb w4, [x0, x2]",
        "b 1b",
        "2:",
        "ret",
        memcpy = sym memcpy,
    );
}

/// Fills `len` bytes (memset(3)).
///
/// # Safety
/// As in C.
// SAFETY: the compiler expects this name and this behaviour.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    #[cfg(target_arch = "x86_64")]
    naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret");
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        "mov x3, x0",
        "cbz x2, 2f",
        "1:",
        "strb w1, [x3], #1",
        "subs x2, x2, #1",
        "b.ne 1b",
        "2:",
        "ret",
    );
}

/// Compares `len` bytes (memcmp(3)).
///
/// # Safety
/// As in C.
// SAFETY: the compiler expects this name and this behaviour.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "xor ecx, ecx",
        "1:",
        "cmp rcx, rdx",
        "je 2f",
        "movzx eax, byte ptr [rdi + rcx]",
        "movzx r8d, byte ptr [rsi + rcx]",
        "inc rcx",
        "sub eax, r8d",
        "je 1b",
        "ret",
        "2:",
        "xor eax, eax",
        "ret",
    );
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        "1:",
        "cbz x2, 2f",
        "sub x2, x2, #1",
        "ldrb w3, [x0], #1",
        "ldrb w4, [x1], #1",
        "subs w5, w3, w4",
        "b.eq 1b",
        "mov w0, w5",
        "ret",
        "2:",
        "mov w0, #0",
        "ret",
    );
}

/// Whether `len` bytes differ: what the compiler makes of a memcmp(3) whose sign does not matter.
///
/// # Safety
/// As in C.
// SAFETY: the compiler expects this name and this behaviour.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, len: usize) -> i32 {
    #[cfg(target_arch = "x86_64")]
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp);
    #[cfg(target_arch = "aarch64")]
    naked_asm!("b {memcmp}", memcmp = sym memcmp);
}

/// The length of a string without its NUL (strlen(3)).
///
/// # Safety
/// As in C.
// SAFETY: the compiler expects this name and this behaviour.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "xor eax, eax",
        "1:",
        "cmp byte ptr [rdi + rax], 0",
        "je 2f",
        "inc rax",
        "jmp 1b",
        "2:",
        "ret",
    );
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        "mov x1, #0",
        "1:",
        "ldrb w2, [x0, x1]",
        "cbz w2, 2f",
        "add x1, x1, #1",
        "b 1b",
        "2:",
        "mov x0, x1",
        "ret",
    );
}

/// `core` is compiled with unwinding, and its tables refer to these functions. Nothing unwinds here.
mod unwinding {
    // SAFETY: the tables of `core` refer to this name. It is never called.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}

    // SAFETY: as above.
    #[unsafe(no_mangle)]
    extern "C" fn _Unwind_Resume() -> ! {
        rproxy_sys_raw::process::exit(super::PANICKED)
    }
}

/// The exit status after a panic, as that of Rust's programs.
const PANICKED: u8 = 101;

/// Ends the process after a bug. The runtime then sees its status pipe closed, or a proxy that has failed.
#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    write_error(b"rproxy-shim: panicked at ");
    write_error(info.location().map_or("an unknown place", |location| location.file()).as_bytes());
    write_error(b"\n");
    exit(PANICKED)
}
