
async fn open_a_second_connection(process: &Process) {
    let _ = process.redial.connect().await; //~ E0616
}
