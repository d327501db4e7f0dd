//! Conversations: those of real drivers, and whatever a hostile client may send to a database that
//! is slow wherever it likes.

use std::collections::VecDeque;

use pgsilo_wire::frame::Header;
use proptest::prelude::*;

use super::{Action, Conversation};

fn ask(conversation: &mut Conversation, tags: &[u8]) {
    for tag in tags {
        conversation.ask(Header { tag: *tag, first: None, length: 0 });
    }
}

/// Answers by their tags; a status in lower case stands for a ReadyForQuery.
fn answer(conversation: &mut Conversation, tags: &[u8]) {
    for tag in tags {
        let (tag, first) = match *tag {
            b'i' | b't' | b'e' => (b'Z', Some(tag.to_ascii_uppercase())),
            tag => (tag, None),
        };
        conversation.answer(Header { tag, first, length: 1 });
    }
}

fn is_idle(conversation: &Conversation) -> bool {
    !conversation.may_be_busy() && conversation.is_outside()
}

#[test]
fn conversations_of_drivers_end_idle() {
    // What the client sends, what the database answers to it, and so on.
    let conversations: &[&[(&[u8], &[u8])]] = &[
        &[(b"Q", b"TDCi")],
        &[(b"PBDES", b"12TDCi")],
        &[(b"QQQ", b"CiCiCi")],
        // COPY by a Query, as psql, asyncpg, pgx and JDBC do it; twice in one.
        &[(b"Q", b"G"), (b"ddc", b"Ci")],
        &[(b"Q", b"G"), (b"dc", b"CG"), (b"dc", b"Ci")],
        // With a Sync behind Execute, as tokio-postgres does it; and with none before the end.
        &[(b"BES", b"2G"), (b"dd", b""), (b"cS", b"Ci")],
        &[(b"BES", b"2G"), (b"ddc", b"C"), (b"S", b"i"), (b"BES", b"2G"), (b"cS", b"Ci")],
        &[(b"BEH", b"2G"), (b"dcS", b"Ci")],
        // All of it at once: nothing is swallowed.
        &[(b"BEdcS", b"2GCi")],
        // Failures.
        &[(b"Q", b"G"), (b"f", b"Ei")],
        &[(b"Q", b"G"), (b"d", b"Ei"), (b"dc", b""), (b"BES", b"2G"), (b"cS", b"Ci")],
        &[(b"BEH", b"2G"), (b"d", b"E"), (b"dcS", b"i")],
        // The Sync behind the Execute is swallowed, and the next request shows that; COPYs follow.
        &[(b"BES", b"2G"), (b"dfS", b"Ei"), (b"Q", b"TDCi")],
        &[(b"BES", b"2G"), (b"d", b"E"), (b"fS", b"i"), (b"PBDES", b"12TDCi")],
        &[(b"BES", b"2G"), (b"fS", b"Ei"), (b"BES", b"2G"), (b"cS", b"Ci")],
        &[(b"BES", b"2G"), (b"fS", b"Ei"), (b"BES", b"2G"), (b"fS", b"Ei"), (b"Q", b"Ei")],
        &[(b"BES", b"2G"), (b"fSPS", b"Ei1i")],
        &[(b"BES", b"2G"), (b"fSQF", b"EiEiVi")],
        // A trigger has ended it before it read anything: then both are answered.
        &[(b"BES", b"2G"), (b"fS", b"Eii")],
        &[(b"PS", b"Ei")],
        &[(b"F", b"Vi")],
    ];
    for conversation in conversations {
        let mut own = Conversation::begin();
        assert!(is_idle(&own));
        for (asked, answered) in *conversation {
            ask(&mut own, asked);
            answer(&mut own, answered);
        }
        assert!(is_idle(&own) && !own.is_busy(), "{conversation:?}: {own:?}");
        let terminate = own.ask(Header { tag: b'X', first: None, length: 0 });
        assert_eq!(terminate, Action::Intercept, "{conversation:?}");
    }
}

#[test]
fn a_client_cannot_claim_that_a_copy_swallowed_what_it_asked_for() {
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"PBESc");
    assert!(!conversation.is_busy(), "its own harm");
    assert!(conversation.may_be_busy());
    answer(&mut conversation, b"12Ci");
    assert!(!conversation.may_be_busy());
    // The end that was sent for a COPY that failed ends the one behind it.
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"E");
    answer(&mut conversation, b"G");
    ask(&mut conversation, b"SEc");
    answer(&mut conversation, b"EiG");
    ask(&mut conversation, b"Sc");
    answer(&mut conversation, b"C");
    assert!(conversation.may_be_busy(), "the last Sync is answered");
    // A Query is the oldest that is unanswered, once the Sync before it has been swallowed.
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"E");
    answer(&mut conversation, b"G");
    ask(&mut conversation, b"ScQ");
    answer(&mut conversation, b"CG");
    ask(&mut conversation, b"Sc");
    answer(&mut conversation, b"C");
    ask(&mut conversation, b"S");
    answer(&mut conversation, b"i");
    assert!(conversation.may_be_busy(), "the Query was, the last Sync is not");
    // A COPY that a trigger of the client's own ends before a byte of it is read: the first Sync is
    // answered, and behind the second comes what lasts.
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"PBES");
    answer(&mut conversation, b"12G");
    ask(&mut conversation, b"cPBES");
    answer(&mut conversation, b"Ei");
    assert!(conversation.may_be_busy());
    // Such a COPY swallows nothing, and what is asked behind it runs.
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"PBES");
    answer(&mut conversation, b"12G");
    ask(&mut conversation, b"fSQ");
    answer(&mut conversation, b"Eii");
    assert!(conversation.may_be_busy());
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"ES");
    answer(&mut conversation, b"G");
    ask(&mut conversation, b"QFEQ");
    answer(&mut conversation, b"EiCiVi");
    assert!(conversation.may_be_busy(), "one Query is left");
    // What a COPY swallowed shows in an answer, not in a Sync's ReadyForQuery, and not in a notice.
    let mut conversation = Conversation::begin();
    ask(&mut conversation, b"PBES");
    answer(&mut conversation, b"12G");
    ask(&mut conversation, b"fSS");
    answer(&mut conversation, b"EiNASi");
    assert!(conversation.may_be_busy());
    ask(&mut conversation, b"PS");
    answer(&mut conversation, b"1i");
    assert!(!conversation.may_be_busy());
}

#[test]
fn a_session_is_outside_a_transaction_when_the_database_says_so() {
    let mut conversation = Conversation::begin();
    assert!(!conversation.take_crossed());
    ask(&mut conversation, b"QQ");
    answer(&mut conversation, b"Ct");
    assert!(!conversation.is_outside() && !conversation.take_crossed());
    answer(&mut conversation, b"Ci");
    assert!(
        conversation.is_outside() && conversation.take_crossed() && !conversation.take_crossed()
    );
}

/// A message of a client, and what it makes the database do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    Query(Does),
    Parse,
    Execute(Does),
    Function,
    Sync,
    Flush,
    Data,
    BadData,
    Done,
    Fail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    Select,
    Begin,
    Commit,
    Fails,
    /// So many COPYs, one after the other.
    Copy(u8),
    /// One that a trigger ends before its data is read.
    CopyFails,
}

impl Says {
    fn tag(self) -> u8 {
        match self {
            Says::Query(_) => b'Q',
            Says::Parse => b'P',
            Says::Execute(_) => b'E',
            Says::Function => b'F',
            Says::Sync => b'S',
            Says::Flush => b'H',
            Says::Data | Says::BadData => b'd',
            Says::Done => b'c',
            Says::Fail => b'f',
        }
    }

    /// Whether an idle database takes no notice of it.
    fn is_nothing(self) -> bool {
        matches!(self, Says::Flush | Says::Data | Says::BadData | Says::Done | Says::Fail)
    }
}

/// PostgreSQL's main loop, as far as it concerns who is owed what (`PostgresMain`, `CopyGetData`).
#[derive(Debug, Default)]
struct Database {
    said: VecDeque<Says>,
    answers: VecDeque<u8>,
    block: bool,
    failed: bool,
    /// Begun by an extended query, until Sync.
    implicit: bool,
    skips: bool,
    copy: Option<Copying>,
    fatal: bool,
}

#[derive(Clone, Copy, Debug)]
struct Copying {
    by_query: bool,
    more: u8,
}

impl Database {
    fn is_idle(&self) -> bool {
        self.said.iter().all(|said| said.is_nothing())
            && !self.block
            && !self.implicit
            && !self.skips
            && self.copy.is_none()
    }

    fn ready(&mut self) {
        self.implicit = false;
        self.skips = false;
        self.answers.push_back(match (self.block, self.failed) {
            (false, _) => b'i',
            (true, false) => b't',
            (true, true) => b'e',
        });
    }

    fn fail(&mut self, by_query: bool) {
        self.copy = None;
        self.failed = self.block;
        self.answers.push_back(b'E');
        match by_query {
            true => self.ready(),
            false => self.skips = true,
        }
    }

    fn run(&mut self, does: Does, by_query: bool) {
        self.implicit |= !by_query;
        let refused = self.failed && does != Does::Commit;
        match does {
            _ if refused => return self.fail(by_query),
            Does::Select => self.answers.push_back(b'C'),
            Does::Begin => {
                self.block = true;
                self.answers.push_back(b'C');
            }
            Does::Commit => {
                (self.block, self.failed) = (false, false);
                self.answers.push_back(b'C');
            }
            Does::Fails => return self.fail(by_query),
            Does::CopyFails => {
                self.answers.push_back(b'G');
                return self.fail(by_query);
            }
            Does::Copy(times) => {
                self.answers.push_back(b'G');
                let more = if by_query { times } else { 0 };
                self.copy = Some(Copying { by_query, more });
                return;
            }
        }
        if by_query {
            self.ready();
        }
    }

    /// Takes one message.
    fn step(&mut self) {
        let Some(said) = self.said.pop_front() else { return };
        match (self.copy, said) {
            (Some(_), Says::Sync | Says::Flush | Says::Data) => {}
            (Some(Copying { by_query, .. }), Says::BadData | Says::Fail) => self.fail(by_query),
            (Some(Copying { by_query, more }), Says::Done) => {
                self.answers.push_back(b'C');
                self.copy = None;
                match more.checked_sub(1) {
                    Some(more) => {
                        self.answers.push_back(b'G');
                        self.copy = Some(Copying { by_query, more });
                    }
                    None if by_query => self.ready(),
                    None => {}
                }
            }
            (Some(_), _) => self.fatal = true,
            (None, Says::Sync) => self.ready(),
            (None, _) if self.skips || said.is_nothing() => {}
            (None, Says::Query(does)) => self.run(does, true),
            (None, Says::Execute(does)) => self.run(does, false),
            (None, Says::Parse) => {
                self.implicit = true;
                self.answers.push_back(b'1');
            }
            (None, Says::Function) => {
                self.answers.push_back(b'V');
                self.ready();
            }
            (None, _) => {}
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Move {
    Client(Says),
    Database,
    Answer,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let does = || {
        prop::sample::select(vec![
            Does::Select,
            Does::Begin,
            Does::Commit,
            Does::Fails,
            Does::Copy(0),
            Does::Copy(0),
            Does::Copy(1),
            Does::CopyFails,
        ])
    };
    let says = prop_oneof![
        2 => does().prop_map(Says::Query),
        4 => does().prop_map(Says::Execute),
        6 => Just(Says::Sync),
        4 => Just(Says::Done),
        1 => prop::sample::select(vec![
            Says::Parse, Says::Function, Says::Flush, Says::Data, Says::BadData, Says::Fail,
        ]),
    ];
    let one = prop_oneof![says.prop_map(Move::Client), Just(Move::Database), Just(Move::Answer),];
    prop::collection::vec(one, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A session that counts as idle has a database that is, whatever is sent and when.
    #[test]
    fn no_client_looks_idle_while_the_database_is_not(moves in moves()) {
        let (mut conversation, mut database) = (Conversation::begin(), Database::default());
        for one in moves {
            match one {
                Move::Client(says) => {
                    ask(&mut conversation, &[says.tag()]);
                    database.said.push_back(says);
                }
                Move::Database => database.step(),
                Move::Answer => {
                    if let Some(tag) = database.answers.pop_front() {
                        answer(&mut conversation, &[tag]);
                    }
                }
            }
            if database.fatal {
                break;
            }
            prop_assert!(!is_idle(&conversation) || database.is_idle(), "{conversation:?} {database:?}");
        }
    }
}
