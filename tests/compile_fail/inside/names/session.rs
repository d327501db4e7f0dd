
fn judge_without_a_signature() {
    let _ = crate::token::rules::judge; //~ E0603
}

fn ask_openbao_past_the_lessor() {
    let _: crate::lease::openbao::OpenBao; //~ E0603
    let _: crate::lease::identity::Identity; //~ E0603
    let _: crate::lease::revoker::Revocation; //~ E0603
}

fn write_a_token_down(token: crate::token::Token) {
    let crate::token::Token(_) = token; //~ E0603
}
