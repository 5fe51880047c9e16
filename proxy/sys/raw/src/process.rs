//! The process: its arguments and environment, other programs, its end.
#![expect(unsafe_code, reason = "the kernel passes arguments by raw pointers")]

use core::ffi::{CStr, c_char};
use core::slice;

use crate::arch::number;
use crate::call;
use crate::errno::Errno;

const AT_FDCWD: usize = (-100_isize).cast_unsigned();

/// The arguments and the environment of the process, as the kernel has put them on the stack: the number of
/// arguments, pointers to them, NULL, pointers to the variables, NULL (System V ABI, "Process Initialization").
#[derive(Debug)]
pub struct Arguments {
    /// All words from the number to the first NULL.
    words: &'static mut [*const c_char],
    /// The index of the first argument, the name of the program: 1, or 0 after an insertion.
    first: usize,
    /// The variables and the last NULL.
    environment: &'static [*const c_char],
}

impl Arguments {
    /// Reads the stack that a process starts with.
    ///
    /// # Safety
    /// `stack` is the stack pointer at the entry of the program, and nobody else uses what it points to.
    pub unsafe fn from_stack(stack: *mut usize) -> Self {
        // SAFETY: the first word is the number of arguments.
        let count = unsafe { stack.read() };
        let words = stack.cast::<*const c_char>();
        // SAFETY: after the arguments and their NULL, the environment begins.
        let environment = unsafe { words.add(count + 2) };
        let mut variables = 0;
        // SAFETY: the environment ends with a NULL, where this ends.
        while !unsafe { environment.wrapping_add(variables).read() }.is_null() {
            variables += 1;
        }
        // SAFETY: the number, the arguments and NULL, which only this value refers to.
        let words = unsafe { slice::from_raw_parts_mut(words, count + 2) };
        // SAFETY: the variables and NULL, which nobody writes.
        let environment = unsafe { slice::from_raw_parts(environment, variables + 1) };
        // Somebody may have started the program without even its name.
        Self { words, first: usize::from(count > 0), environment }
    }

    /// The arguments, without the name of the program.
    pub fn iter(&self) -> impl Iterator<Item = &'static [u8]> {
        let arguments = self.words.get(self.first + 1..).unwrap_or_default().iter();
        arguments.take_while(|argument| !argument.is_null()).map(|argument| {
            // SAFETY: the kernel has put a string there, which stays as long as the process, or `insert` has.
            let text = unsafe { CStr::from_ptr(*argument) };
            text.to_bytes()
        })
    }

    /// Inserts an argument so that `index` arguments, without the name of the program, precede it. There is room for
    /// one, in the place of the number of arguments. Returns whether it was used.
    pub fn insert(&mut self, index: usize, argument: &'static CStr) -> bool {
        let before = index + 1;
        if self.first == 0 || before >= self.words.len() - 1 {
            return false;
        }
        self.words.copy_within(1..=before, 0);
        self.words[before] = argument.as_ptr();
        self.first = 0;
        true
    }

    /// The value of an environment variable.
    pub fn variable(&self, name: &str) -> Option<&'static [u8]> {
        self.environment.iter().take_while(|variable| !variable.is_null()).find_map(|variable| {
            // SAFETY: the kernel has put a string there, which stays as long as the process.
            let text = unsafe { CStr::from_ptr(*variable) };
            text.to_bytes().strip_prefix(name.as_bytes())?.strip_prefix(b"=")
        })
    }

    /// Replaces this process by `program`, with these arguments after its name, and this environment (execve(2)).
    /// Returns only if that fails.
    pub fn execute(&mut self, program: &CStr) -> Errno {
        self.words[self.first] = program.as_ptr();
        let arguments = self.words[self.first..].as_ptr().expose_provenance();
        let environment = self.environment.as_ptr().expose_provenance();
        let program = program.as_ptr().expose_provenance();
        // SAFETY: both lists end with NULL, and consist of strings that end with NUL.
        let failed = unsafe { call(number::EXECVE, [program, arguments, environment]) };
        // The name points to `program`, which the caller may free.
        self.words[self.first] = c"".as_ptr();
        failed.err().unwrap_or(Errno(0))
    }
}

/// Reads a symbolic link (readlink(2)); what does not fit the buffer is cut off.
///
/// # Errors
/// Those of readlink(2).
pub fn read_link<'a>(path: &CStr, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
    let (to, len) = (buffer.as_mut_ptr().expose_provenance(), buffer.len());
    let arguments = [AT_FDCWD, path.as_ptr().expose_provenance(), to, len];
    // SAFETY: the path ends with NUL, and the kernel writes at most `len` bytes into the buffer.
    let len = unsafe { call(number::READLINKAT, arguments) }?;
    Ok(&buffer[..len])
}

/// The effective user of this process (geteuid(2)).
pub fn effective_user() -> u32 {
    // SAFETY: the call takes no arguments and does not fail.
    let user = unsafe { call(number::GETEUID, []) };
    user.ok().and_then(|user| u32::try_from(user).ok()).unwrap_or(u32::MAX)
}

/// Ends the process (exit_group(2)).
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: the call takes no pointers, and does not return.
        let _never = unsafe { call(number::EXIT_GROUP, [status.into()]) };
    }
}

#[cfg(test)]
mod tests {
    use std::boxed::Box;
    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// What the kernel puts on the stack.
    fn arguments(words: &[&'static CStr], variables: &[&'static CStr]) -> Arguments {
        let address = |text: &&CStr| text.as_ptr().expose_provenance();
        let mut stack = vec![words.len()];
        stack.extend(words.iter().map(address));
        stack.push(0);
        stack.extend(variables.iter().map(address));
        stack.push(0);
        let stack: &'static mut [usize] = Box::leak(stack.into_boxed_slice());
        // SAFETY: it has the form of the stack at the entry of a program, and nobody else uses it.
        unsafe { Arguments::from_stack(stack.as_mut_ptr()) }
    }

    fn words(arguments: &Arguments) -> Vec<&'static [u8]> {
        arguments.iter().collect()
    }

    #[test]
    fn arguments_and_variables_are_those_of_the_stack() {
        let arguments = arguments(&[c"shim", c"-a", c"b"], &[c"PATH=/bin", c"PATHS=x", c"EMPTY="]);
        assert_eq!(words(&arguments), [&b"-a"[..], b"b"]);
        assert_eq!(arguments.variable("PATHS"), Some(&b"x"[..]));
        assert_eq!(arguments.variable("PATH"), Some(&b"/bin"[..]));
        assert_eq!(arguments.variable("EMPTY"), Some(&b""[..]));
        assert_eq!(arguments.variable("PAT"), None);
    }

    #[test]
    fn one_argument_can_be_inserted_anywhere() {
        for (index, expected) in [(0, ["new", "-a", "b"]), (1, ["-a", "new", "b"]), (2, ["-a", "b", "new"])] {
            let mut arguments = arguments(&[c"shim", c"-a", c"b"], &[c"A=1"]);
            assert!(arguments.insert(index, c"new"));
            assert_eq!(words(&arguments), expected.map(str::as_bytes));
            assert_eq!(arguments.variable("A"), Some(&b"1"[..]));
            assert!(!arguments.insert(index, c"another"));
        }
        assert!(!arguments(&[c"shim", c"-a"], &[]).insert(2, c"new"));
    }

    #[test]
    fn a_program_may_have_been_started_without_its_name() {
        let mut arguments = arguments(&[], &[c"A=1"]);
        assert!(words(&arguments).is_empty());
        assert!(!arguments.insert(0, c"new"));
        assert_eq!(arguments.execute(c"/nowhere"), Errno::NOENT);
        assert_eq!(arguments.variable("A"), Some(&b"1"[..]));
    }

    #[test]
    fn links_are_read_up_to_the_length_of_the_buffer() {
        let mut buffer = [0; 4];
        let target = std::fs::read_link("/proc/self/exe").unwrap();
        let start = read_link(c"/proc/self/exe", &mut buffer).unwrap();
        assert!(target.as_os_str().as_encoded_bytes().starts_with(start) && start.len() == 4);
        assert_eq!(read_link(c"/nowhere", &mut buffer), Err(Errno::NOENT));
    }
}
