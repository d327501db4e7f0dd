//! Readiness by epoll: bytes through one buffer of the thread, or through a pipe of each direction
//! with splice(2).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::{CHUNK, Worker};

/// How bytes are moved.
#[derive(Clone, Copy)]
pub enum Way {
    Scratch,
    Splice,
}

/// A thread with its epoll instance.
pub struct Polled {
    way: Way,
    epoll: Arc<OwnedFd>,
    pairs: Arc<Mutex<Vec<Option<Pair>>>>,
}

/// A client and its server, and the directions from each of them to the other.
struct Pair {
    ends: [TcpStream; 2],
    lanes: [Lane; 2],
}

/// One direction: what is on its way, where the sink would not take it.
enum Lane {
    Scratch { left: Vec<u8> },
    Splice { pipe: (OwnedFd, OwnedFd), left: usize },
}

/// Whether a direction goes on.
#[derive(PartialEq)]
enum Flow {
    /// Until one side is ready again.
    Waits,
    Ends,
}

impl Polled {
    pub fn start(way: Way) -> io::Result<Polled> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        let pairs = Arc::default();
        let worker = Polled { way, epoll: Arc::clone(&epoll), pairs: Arc::clone(&pairs) };
        thread::spawn(move || serve(&epoll, &pairs));
        Ok(worker)
    }
}

impl Worker for Polled {
    fn take(&self, client: TcpStream, server: TcpStream) -> io::Result<()> {
        let ends = [client, server];
        for end in &ends {
            end.set_nonblocking(true)?;
        }
        let pair = Pair { ends, lanes: [Lane::new(self.way)?, Lane::new(self.way)?] };
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let free = pairs.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            pairs.push(None);
            pairs.len() - 1
        });
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        for end in &pair.ends {
            epoll::add(&self.epoll, end, EventData::new_u64(place as u64), flags)?;
        }
        pairs[place] = Some(pair);
        Ok(())
    }
}

fn serve(epoll: &OwnedFd, pairs: &Mutex<Vec<Option<Pair>>>) {
    let mut scratch = vec![0; CHUNK];
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("epoll_wait: {error}"),
        }
        let mut pairs = pairs.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &events {
            let place = event.data.u64() as usize;
            let Some(pair) = pairs.get_mut(place).and_then(Option::as_mut) else { continue };
            if pair.relay(&mut scratch) == Flow::Ends {
                // To close both is all that either side needs to know here.
                pairs[place] = None;
            }
        }
    }
}

impl Pair {
    /// Answers first.
    fn relay(&mut self, scratch: &mut [u8]) -> Flow {
        let Pair { ends: [client, server], lanes: [up, down] } = self;
        match down.relay(server, client, scratch) {
            Flow::Ends => Flow::Ends,
            Flow::Waits => up.relay(client, server, scratch),
        }
    }
}

impl Lane {
    fn new(way: Way) -> io::Result<Lane> {
        Ok(match way {
            Way::Scratch => Lane::Scratch { left: Vec::new() },
            Way::Splice => {
                let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
                fcntl_setpipe_size(&pipe.1, CHUNK)?;
                Lane::Splice { pipe, left: 0 }
            }
        })
    }

    fn relay(&mut self, source: &TcpStream, sink: &TcpStream, scratch: &mut [u8]) -> Flow {
        loop {
            match self.write_left(sink) {
                Ok(true) => {}
                Ok(false) => return Flow::Waits,
                Err(_gone) => return Flow::Ends,
            }
            let (read, all) = match self {
                Lane::Scratch { left } => {
                    let read = (&*source).read(scratch);
                    if let Ok(length) = read {
                        match write(sink, &scratch[..length]) {
                            Ok(written) => left.extend_from_slice(&scratch[written..length]),
                            Err(_gone) => return Flow::Ends,
                        }
                    }
                    // As tokio has it: less than was asked for means that there is no more now.
                    (read, scratch.len())
                }
                Lane::Splice { pipe, left } => {
                    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
                    let read = splice(source, None, &pipe.1, None, CHUNK, flags);
                    if let Ok(length) = read {
                        *left = length;
                        match self.write_left(sink) {
                            Ok(_) => {}
                            Err(_gone) => return Flow::Ends,
                        }
                    }
                    // A pipe may be full of small pieces: only the next call tells.
                    (read.map_err(io::Error::from), 1)
                }
            };
            match read {
                Ok(0) => return Flow::Ends,
                Ok(length) if length < all => return Flow::Waits,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flow::Waits,
                Err(_gone) => return Flow::Ends,
            }
        }
    }

    /// Whether nothing is left.
    fn write_left(&mut self, sink: &TcpStream) -> io::Result<bool> {
        match self {
            Lane::Scratch { left } => {
                if !left.is_empty() {
                    let written = write(sink, left)?;
                    left.drain(..written);
                }
                Ok(left.is_empty())
            }
            Lane::Splice { pipe, left } => {
                while *left > 0 {
                    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
                    match splice(&pipe.0, None, sink, None, *left, flags) {
                        Ok(written) => *left -= written,
                        Err(Errno::AGAIN) => return Ok(false),
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(true)
            }
        }
    }
}

/// How much the sink takes.
fn write(mut sink: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match sink.write(&bytes[written..]) {
            Ok(length) => written += length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}
