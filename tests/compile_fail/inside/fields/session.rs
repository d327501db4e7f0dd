
fn any<T>() -> T {
    panic!()
}

fn write_a_stage_down() {
    let _ = Accepted { ..any() }; //~ E0451
    let _ = Secured { ..any() }; //~ E0451
    let _ = Started { ..any() }; //~ E0451
    let _ = Identified { ..any() }; //~ E0451
    let _ = Routed { ..any() }; //~ E0451
    let _ = Leased { ..any() }; //~ E0451
    let _ = Attached { ..any() }; //~ E0451
    let _ = Spliced { ..any() }; //~ E0451
    let _ = Cancelling { ..any() }; //~ E0451
}

fn write_a_proof_down() {
    let _ = routed::SessionPermits { ..any() }; //~ E0451
    let _ = crate::backend::Connection { ..any() }; //~ E0451
    let _ = crate::backend::Redial { ..any() }; //~ E0451
    let _ = crate::backend::Process { ..any() }; //~ E0451
    let _ = crate::token::Claims { ..any() }; //~ E0451
    let _ = crate::registry::Tenant { ..any() }; //~ E0451
    let _ = crate::limits::TallyPermit::<u8> { ..any() }; //~ E0451
}
