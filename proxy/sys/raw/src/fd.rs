//! Descriptors.
#![expect(unsafe_code, reason = "descriptors are closed and replaced here, and buffers have raw pointers")]

use core::ffi::CStr;

use crate::arch::number;
use crate::call;
use crate::errno::Errno;

/// Commands of fcntl(2).
const F_GETFD: usize = 1;
const F_SETFD: usize = 2;
const F_GETFL: usize = 3;
const F_GETPIPE_SZ: usize = 1032;

const FD_CLOEXEC: usize = 1;
const O_ACCMODE: usize = 3;
const O_RDWR: usize = 2;
const O_DIRECTORY: usize = if cfg!(target_arch = "aarch64") { 0o40000 } else { 0o200_000 };
const O_CLOEXEC: usize = 0o2_000_000;
const AT_FDCWD: usize = (-100_isize).cast_unsigned();

/// An open descriptor, which is closed when dropped.
#[derive(Debug)]
pub struct Fd(i32);

impl Fd {
    /// Owns a descriptor that a call has just returned.
    pub(crate) fn returned(result: usize) -> Self {
        // A descriptor is a positive int.
        Self(i32::try_from(result).unwrap_or(-1))
    }

    /// Takes ownership of the inherited descriptor `number`, and sets close-on-exec on it. Call it before anything
    /// else opens a file, and once for each number.
    ///
    /// # Errors
    /// [`Errno::BADF`] if nothing is open there.
    pub fn claim(number: i32) -> Result<Self, Errno> {
        let fd = Self(number);
        match fd.set_inherited(false) {
            Ok(()) => Ok(fd),
            Err(error) => {
                core::mem::forget(fd);
                Err(error)
            }
        }
    }

    /// Its number.
    pub fn number(&self) -> i32 {
        self.0
    }

    /// Its number as an argument of a call.
    pub(crate) fn argument(&self) -> usize {
        self.0.cast_unsigned() as usize
    }

    /// Whether programs that this process executes inherit it.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn set_inherited(&self, inherited: bool) -> Result<(), Errno> {
        let flags = if inherited { 0 } else { FD_CLOEXEC };
        self.control(F_SETFD, flags).map(drop)
    }

    /// Whether it is a pipe that can be written to.
    pub fn is_writable_pipe(&self) -> bool {
        // Nothing else has a size of a pipe: F_GETPIPE_SZ fails with EBADF.
        let is_pipe = self.control(F_GETPIPE_SZ, 0).is_ok();
        // O_RDONLY is 0.
        is_pipe && self.control(F_GETFL, 0).is_ok_and(|flags| flags & O_ACCMODE != 0)
    }

    /// Moves it to `number` with close-on-exec, and closes what was open there (dup3(2)).
    ///
    /// # Errors
    /// Those of dup3(2).
    pub fn move_to(self, number: i32) -> Result<Self, Errno> {
        if self.0 == number {
            return Ok(self);
        }
        let to = number.cast_unsigned() as usize;
        // SAFETY: no pointers; the callers own `number`, which replaces what they had there.
        unsafe { call(number::DUP3, [self.argument(), to, O_CLOEXEC]) }.map(Self::returned)
    }

    /// Reads at most a buffer (read(2)); 0 bytes mean the end.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let arguments = [self.argument(), buffer.as_mut_ptr().expose_provenance(), buffer.len()];
        // SAFETY: the kernel writes at most `len` bytes into the buffer, which is borrowed mutably.
        unsafe { call(number::READ, arguments) }
    }

    /// Writes a buffer (write(2)); returns how much was written.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn write(&self, buffer: &[u8]) -> Result<usize, Errno> {
        write(self.argument(), buffer)
    }

    fn control(&self, command: usize, value: usize) -> Result<usize, Errno> {
        // SAFETY: these commands take no pointers.
        unsafe { call(number::FCNTL, [self.argument(), command, value]) }
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        close(self.argument());
    }
}

fn close(number: usize) {
    // SAFETY: the callers own the descriptor, or close what nobody owns. Linux frees the number even if the call
    // fails.
    let _closed = unsafe { call(number::CLOSE, [number]) };
}

fn write(number: usize, buffer: &[u8]) -> Result<usize, Errno> {
    let arguments = [number, buffer.as_ptr().expose_provenance(), buffer.len()];
    // SAFETY: the kernel reads `len` bytes of the buffer, which is borrowed.
    unsafe { call(number::WRITE, arguments) }
}

/// Writes to standard error; what cannot be written is lost.
pub fn write_error(text: &[u8]) {
    let _written = write(2, text);
}

/// Opens those of the descriptors 0, 1 and 2 that are closed, so that no other file gets their numbers: as
/// `/dev/null`, or as a directory where that is missing.
pub fn open_standard_streams() {
    for number in 0..3 {
        // SAFETY: no pointers; the call only reads the number.
        if unsafe { call(number::FCNTL, [number, F_GETFD, 0]) }.is_err() {
            // The lowest free number is `number`. It stays open.
            let opened = open(c"/dev/null", O_RDWR).or_else(|_missing| open(c"/", O_DIRECTORY));
            core::mem::forget(opened);
        }
    }
}

fn open(path: &CStr, flags: usize) -> Result<Fd, Errno> {
    let arguments = [AT_FDCWD, path.as_ptr().expose_provenance(), flags, 0];
    // SAFETY: the path ends with a NUL.
    unsafe { call(number::OPENAT, arguments) }.map(Fd::returned)
}

/// Closes what is open at `number`. Call it before anything else opens a file.
pub fn close_inherited(number: u16) {
    close(number.into());
}

/// Closes all descriptors from `first` on. Call it before anything else opens a file.
pub fn close_inherited_from(first: u16) {
    let all = [first.into(), u32::MAX as usize, 0];
    // SAFETY: no pointers; the caller has opened nothing there.
    if unsafe { call(number::CLOSE_RANGE, all) }.is_err() {
        // Before Linux 5.9, or with a container runtime's filter that does not know the call.
        close_listed_from(first.into());
    }
}

/// Like [`close_inherited_from`], one by one.
fn close_listed_from(first: usize) {
    let Ok(directory) = open(c"/proc/self/fd", O_DIRECTORY | O_CLOEXEC) else {
        return;
    };
    let mut buffer = [0; 1024];
    while let Ok(len @ 1..) = list(&directory, &mut buffer) {
        for number in Entries(&buffer[..len]).filter_map(|name| str::from_utf8(name).ok()?.parse().ok()) {
            if number >= first && number != directory.argument() {
                close(number);
            }
        }
    }
}

/// Reads some entries of a directory (getdents64(2)).
fn list(directory: &Fd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let arguments = [directory.argument(), buffer.as_mut_ptr().expose_provenance(), buffer.len()];
    // SAFETY: the kernel writes at most `len` bytes into the buffer, which is borrowed mutably.
    unsafe { call(number::GETDENTS64, arguments) }
}

/// The names in what getdents64(2) has written.
struct Entries<'a>(&'a [u8]);

impl<'a> Iterator for Entries<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        // d_ino, d_off: 8 bytes each; d_reclen: 2; d_type: 1; then the name and a NUL.
        let length = u16::from_ne_bytes(*self.0.get(16..)?.first_chunk()?);
        let (entry, rest) = self.0.split_at_checked(length.into())?;
        self.0 = rest;
        entry.get(19..)?.split(|byte| *byte == 0).next()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{PipeReader, PipeWriter, pipe};
    use std::os::fd::IntoRawFd;
    use std::string::{String, ToString};
    use std::vec::Vec;

    use super::*;

    fn claim(fd: impl IntoRawFd) -> Fd {
        Fd::claim(fd.into_raw_fd()).unwrap()
    }

    #[test]
    fn only_the_end_of_a_pipe_that_can_be_written_to_is_one() {
        let (reader, writer): (PipeReader, PipeWriter) = pipe().unwrap();
        assert!(!claim(reader).is_writable_pipe());
        assert!(claim(writer).is_writable_pipe());
        assert!(!claim(File::options().write(true).open("/dev/null").unwrap()).is_writable_pipe());
    }

    #[test]
    fn nothing_is_claimed_where_nothing_is_open() {
        assert_eq!(Fd::claim(987_654).unwrap_err(), Errno::BADF);
    }

    #[test]
    fn what_is_written_is_read_until_the_end() {
        let (reader, writer) = pipe().unwrap();
        let (reader, writer) = (claim(reader), claim(writer));
        assert_eq!(writer.write(b"hello"), Ok(5));
        let mut buffer = [0; 8];
        assert_eq!(reader.read(&mut buffer), Ok(5));
        assert_eq!(&buffer[..5], b"hello");
        drop(writer);
        assert_eq!(reader.read(&mut buffer), Ok(0));
    }

    /// In one test, since others must not open files at the same numbers.
    #[test]
    fn descriptors_from_a_number_on_are_closed_with_and_without_the_call_for_it() {
        let open_at = |number| {
            let moved = claim(File::open("/dev/null").unwrap()).move_to(number).unwrap();
            assert_eq!(moved.number(), number);
            core::mem::forget(moved);
        };
        let is_open = |number| Fd::claim(number).map(core::mem::forget).is_ok();
        for close_from in [close_inherited_from, |first: u16| close_listed_from(first.into())] {
            for number in [700, 701, 900] {
                open_at(number);
            }
            close_from(701);
            assert!(is_open(700) && !is_open(701) && !is_open(900));
            close_from(700);
            assert!(!is_open(700));
        }
    }

    #[test]
    fn entries_of_a_directory_are_listed_by_name() {
        let directory = open(c"/proc/self/task", O_DIRECTORY | O_CLOEXEC).unwrap();
        let mut buffer = [0; 1024];
        let len = list(&directory, &mut buffer).unwrap();
        let names: Vec<_> = Entries(&buffer[..len]).map(String::from_utf8_lossy).collect();
        assert!(names.iter().any(|name| name == ".."), "{names:?}");
        assert!(names.iter().any(|name| *name == std::process::id().to_string()), "{names:?}");
        assert_eq!(Entries(b"cut off").next(), None);
    }
}
