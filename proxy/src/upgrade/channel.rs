//! The channel between two processes: JSON values and descriptors.
//!
//! A value is sent as a length of four bytes and that many bytes of JSON. Descriptors are announced by a
//! value and accompany single bytes. Reads never go past the current value, because reading such a byte with
//! read(2) would lose its descriptor.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::unistd::{read, write};
use rproxy_sys::pass::{MOST, receive_descriptors, send_descriptors};
use rproxy_sys::watch::Watched;
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::SockRef;
use tokio::io::Interest;

/// The maximum length of a value, in bytes: a hundred thousand mappings.
const LONGEST: usize = 16 * 1024 * 1024;

/// One end of the channel. The caller sets deadlines.
pub(super) struct Channel(Watched);

impl Channel {
    /// Wraps a stream socket, on the runtime of the calling thread.
    ///
    /// # Errors
    /// Those of fcntl(2), if it is no descriptor, and of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = socket.into();
        SockRef::from(&socket).set_nonblocking(true)?;
        Ok(Self(Watched::new(socket, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// The socket, for other bytes.
    pub(super) fn into_inner(self) -> Watched {
        self.0
    }

    /// Sends a value.
    pub(super) async fn send(&self, value: &impl Serialize) -> io::Result<()> {
        self.write(&frame(value)?).await
    }

    /// Sends a short value without blocking, completely or not at all.
    ///
    /// # Errors
    /// `EAGAIN` if the socket is full, which means that the other side does not read.
    pub(super) fn send_at_once(&self, value: &impl Serialize) -> io::Result<()> {
        self.write_at_once(&frame(value)?)
    }

    /// Like [`Channel::send_at_once`], for raw bytes.
    pub(super) fn write_at_once(&self, bytes: &[u8]) -> io::Result<()> {
        let written = write(&self.0, bytes)?;
        if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives a value of type `T`.
    pub(super) async fn receive<T: DeserializeOwned>(&self) -> io::Result<T> {
        let mut length = [0; 4];
        self.read(&mut length).await?;
        let length = usize::try_from(u32::from_be_bytes(length)).ok().filter(|length| *length <= LONGEST);
        let mut text = vec![0; length.ok_or(io::ErrorKind::FileTooLarge)?];
        self.read(&mut text).await?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Sends any number of descriptors.
    pub(super) async fn send_descriptors(&self, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        for some in descriptors.chunks(MOST) {
            self.0.io(Interest::WRITABLE, |socket| send_descriptors(socket, some)).await?;
        }
        Ok(())
    }

    /// Receives `count` descriptors, which were sent with one call.
    pub(super) async fn receive_descriptors(&self, count: usize) -> io::Result<Vec<OwnedFd>> {
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            let some = self.0.io(Interest::READABLE, receive_descriptors).await?;
            if some.is_empty() || descriptors.len() + some.len() > count {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "not the descriptors announced"));
            }
            descriptors.extend(some);
        }
        Ok(descriptors)
    }

    /// Sends bytes.
    pub(super) async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.0.io(Interest::WRITABLE, |socket| Ok(write(socket, bytes)?)).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Receives bytes until `bytes` is full.
    pub(super) async fn read(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.0.io(Interest::READABLE, |socket| Ok(read(socket, &mut bytes[filled..])?)).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => filled += more,
            }
        }
        Ok(())
    }
}

fn frame(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value)?;
    let length = frame.len() - 4;
    let field = u32::try_from(length).ok().filter(|_field| length <= LONGEST);
    frame[..4].copy_from_slice(&field.ok_or(io::ErrorKind::FileTooLarge)?.to_be_bytes());
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::runtime::new_runtime;

    #[test]
    fn values_and_descriptors_arrive_in_their_order() {
        let runtime = new_runtime().unwrap();
        let _entered = runtime.enter();
        let (one, other) = UnixStream::pair().unwrap();
        let (one, other) = (Channel::new(one).unwrap(), Channel::new(other).unwrap());
        let file = File::open("/dev/null").unwrap();
        // Longer than the socket buffers.
        let long = "long".repeat(1_000_000);
        let send = async {
            one.send(&600).await.unwrap();
            one.send_descriptors(&vec![file.as_fd(); 600]).await.unwrap();
            one.send(&long).await.unwrap();
        };
        let receive = async {
            let count: usize = other.receive().await.unwrap();
            let descriptors = other.receive_descriptors(count).await.unwrap();
            (descriptors.len(), other.receive::<String>().await.unwrap())
        };
        let ((), (count, text)) = runtime.block_on(async { tokio::join!(send, receive) });
        assert!(count == 600 && text == long);
    }

    #[test]
    fn what_was_not_announced_is_refused() {
        let runtime = new_runtime().unwrap();
        let _entered = runtime.enter();
        let (mut one, other) = UnixStream::pair().unwrap();
        let other = Channel::new(other).unwrap();
        one.write_all(&u32::MAX.to_be_bytes()).unwrap();
        let error = runtime.block_on(other.receive::<String>()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        send_descriptors(one.as_fd(), &[one.as_fd(); 3]).unwrap();
        let error = runtime.block_on(other.receive_descriptors(2)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        one.write_all(b"d").unwrap();
        let error = runtime.block_on(other.receive_descriptors(2)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(one);
        let error = runtime.block_on(other.receive::<String>()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
