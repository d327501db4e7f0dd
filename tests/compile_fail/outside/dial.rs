//! Nobody outside the library reaches the one dial site, what it gives, or what it needs.

fn main() {
    let _ = pgsilo::backend::dial;
    let _: pgsilo::backend::Connection;
    let _: pgsilo::backend::Redial;
    let _: pgsilo::stream::Stream;
}
