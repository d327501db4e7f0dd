//! Completions by io_uring: a send, and behind it the next receive of the same direction, are one
//! submission of two that are linked; one system call hands over and fetches all that there is.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

use crate::{CHUNK, Worker};

/// Of poll(2), on every Linux.
const POLLIN: u32 = 1;
/// What wakes the thread for a new pair.
const DOORBELL: u64 = u64::MAX;
/// Of a completion: whether it is a send's.
const SENT: u64 = 1;

/// A thread with its ring.
pub struct Uring {
    pairs: Mutex<Sender<[TcpStream; 2]>>,
    doorbell: io::PipeWriter,
}

/// One direction. Its buffer is the kernel's while an operation is under way: it stays where it is.
struct Lane {
    source: TcpStream,
    sink: TcpStream,
    buffer: Box<[u8]>,
}

impl Uring {
    pub fn start() -> io::Result<Uring> {
        let (pairs, arrivals) = channel::<[TcpStream; 2]>();
        let (mut bell, doorbell) = io::pipe()?;
        thread::spawn(move || -> io::Result<()> {
            // Before the ring, and so behind it when both go.
            let mut lanes: Vec<Option<Lane>> = Vec::new();
            let mut ring: IoUring = IoUring::builder()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_coop_taskrun()
                .build(4096)?;
            push(&mut ring, &[wait_for_bell(&bell)])?;
            loop {
                ring.submit_and_wait(1)?;
                let done: Vec<_> =
                    ring.completion().map(|done| (done.user_data(), done.result())).collect();
                for (what, result) in done {
                    if what == DOORBELL {
                        bell.read_exact(&mut [0])?;
                        push(&mut ring, &[wait_for_bell(&bell)])?;
                        for pair in arrivals.try_iter() {
                            begin(&mut ring, &mut lanes, pair)?;
                        }
                        continue;
                    }
                    let place = (what >> 1) as usize;
                    let Some(Some(lane)) = lanes.get_mut(place) else { continue };
                    // Successful sends are not told of. Behind one that failed comes its receive,
                    // which is cancelled: with that the lane ends.
                    match (what & SENT, result) {
                        (SENT, _) => lane.close(),
                        (_, ..=0) => {
                            lane.close();
                            lanes[place] = None;
                        }
                        (_, length) => {
                            let send = lane.send(place, length as u32);
                            let receive = lane.receive(place);
                            push(&mut ring, &[send, receive])?;
                        }
                    }
                }
            }
        });
        Ok(Uring { pairs: Mutex::new(pairs), doorbell })
    }
}

impl Worker for Uring {
    fn take(&self, client: TcpStream, server: TcpStream) -> io::Result<()> {
        let pairs = self.pairs.lock().expect("whoever had it lives");
        pairs.send([client, server]).expect("the thread lives");
        (&self.doorbell).write_all(&[0])
    }
}

/// Receives in both directions.
fn begin(
    ring: &mut IoUring,
    lanes: &mut Vec<Option<Lane>>,
    [client, server]: [TcpStream; 2],
) -> io::Result<()> {
    let up = (client.try_clone()?, server.try_clone()?);
    for (source, sink) in [up, (server, client)] {
        let place = lanes.iter().position(Option::is_none).unwrap_or_else(|| {
            lanes.push(None);
            lanes.len() - 1
        });
        let mut lane = Lane { source, sink, buffer: vec![0; CHUNK].into() };
        push(ring, &[lane.receive(place)])?;
        lanes[place] = Some(lane);
    }
    Ok(())
}

fn wait_for_bell(bell: &io::PipeReader) -> Entry {
    let fd = Fd(bell.as_raw_fd());
    opcode::PollAdd::new(fd, POLLIN).build().user_data(DOORBELL)
}

fn push(ring: &mut IoUring, entries: &[Entry]) -> io::Result<()> {
    // SAFETY: descriptors and buffers belong to a `Lane`, or are the doorbell, and stay until the
    // operation is over: a lane goes with the completion of its receive, which comes behind its
    // send.
    while unsafe { ring.submission().push_multiple(entries) }.is_err() {
        ring.submit()?;
    }
    Ok(())
}

impl Lane {
    /// Wakes the other direction as well, which ends by that.
    fn close(&self) {
        for end in [&self.source, &self.sink] {
            let _gone = end.shutdown(Shutdown::Both);
        }
    }

    fn receive(&mut self, place: usize) -> Entry {
        let fd = Fd(self.source.as_raw_fd());
        let receive = opcode::Recv::new(fd, self.buffer.as_mut_ptr(), self.buffer.len() as u32);
        receive.build().user_data((place as u64) << 1)
    }

    /// All of it, before what is linked behind it.
    fn send(&self, place: usize, length: u32) -> Entry {
        const MSG_WAITALL: i32 = 0x100;
        const MSG_NOSIGNAL: i32 = 0x4000;
        let fd = Fd(self.sink.as_raw_fd());
        let send = opcode::Send::new(fd, self.buffer.as_ptr(), length);
        let send = send.flags(MSG_WAITALL | MSG_NOSIGNAL).build();
        send.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS).user_data((place as u64) << 1 | SENT)
    }
}
